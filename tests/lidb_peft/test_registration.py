import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from lidb_peft import LiDBConfig, LiDBModel
from lidb_peft.registration import register


def test_peft_knows_the_method_by_its_name():
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LIDB"] is LiDBConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LIDB"] is LiDBModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["LIDB"] == "lidb_"
    assert PEFT_TYPE_TO_TUNER_MAPPING[LiDBConfig().peft_type] is LiDBModel


def test_another_method_of_the_name_is_not_overwritten(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "LIDB", dict)
    with pytest.raises(RuntimeError, match="PEFT already has a method called LIDB"):
        register()


def test_importing_needs_no_diffusers_and_touches_no_generator():
    code = (
        "import sys, torch; before = torch.get_rng_state(); import lidb_peft; "
        "assert torch.equal(torch.get_rng_state(), before); "
        "assert 'diffusers' not in sys.modules and 'cv2' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
