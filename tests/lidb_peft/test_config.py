import pickle

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config

from lidb_peft import LiDBConfig


def test_defaults_are_the_papers():
    config = LiDBConfig()
    assert (config.r, config.down_dim, config.up_dim, config.scale, config.bias) == (1, 100, 50, 1.0, "none")
    assert config.init_weights
    assert not config.save_projection


def test_the_config_survives_files_dicts_and_pickling(tmp_path):
    config = LiDBConfig(r=2, down_dim=9, seed=4, target_modules=["to_q", "to_k"])
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), LiDBConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, LiDBConfig)
        assert loaded == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert get_peft_config(config.to_dict()) == config
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LIDB"].__name__ == "LiDBConfig"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is 0; choose an integer of 1 or more"),
        ({"down_dim": 1.5}, "down_dim is 1.5"),
        ({"up_dim": -1}, "up_dim is -1"),
        ({"r": 8, "up_dim": 4}, "rank is 8 but the bases have 100 and 4 vectors; choose r <= 4"),
        ({"scale": float("nan")}, "scale is nan; choose a finite number"),
        ({"seed": "x"}, "seed is 'x'; choose an integer"),
        ({"basis": "learned"}, "basis is 'learned'; choose one of orthogonal"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"target_modules": "x", "layers_to_transform": [1]}, "cannot be used when `target_modules` is a str"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_bad_values_are_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiDBConfig(**arguments)
