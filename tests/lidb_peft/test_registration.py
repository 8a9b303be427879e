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
