"""What a theta belongs to; that other spaces are refused is tested with the theta file, which carries the record."""

import json

import pytest

from lidb_peft import LiDBConfig, LiDBSpace, check_record, load_theta, record_config, save_theta, space_record


@pytest.fixture
def models(new_unet, new_text_encoder):
    return {"unet": new_unet(), "text_encoder": new_text_encoder()}


@pytest.mark.parametrize(
    "targets",
    [
        {},
        {"target_modules": ["to_q", "q_proj"]},
        {"target_modules": r".*(attn1\.to_k|self_attn\.v_proj)"},
        {"exclude_modules": ["out_proj"]},
    ],
)
def test_a_record_rebuilds_its_space(models, targets, tmp_path):
    space = LiDBSpace(models, LiDBConfig(r=2, down_dim=8, up_dim=6, scale=0.1, seed=5, **targets))
    record = json.loads(json.dumps(space_record(space, "someone/model")))
    assert record["base_model_name"] == "someone/model"
    again = LiDBSpace(models, record_config(record, "it"))
    assert (again.layer_names, again.config) == (space.layer_names, space.config)
    check_record(record, again, "it")
    path = tmp_path / "me.safetensors"
    save_theta(path, space.theta_0, space)
    load_theta(path, LiDBSpace(models, load_theta(path).config))


def test_a_record_that_is_none_is_refused(models):
    space = LiDBSpace(models, LiDBConfig(down_dim=8, up_dim=6))
    record = space_record(space)
    del record["bases"], record["seed"]
    with pytest.raises(ValueError, match=r"shard-1 does not say .* it lacks \['bases', 'seed'\]; it is damaged"):
        check_record(record, space, "shard-1")
    for targets in ("{", '{"target_modules": "to_q", "layers_to_transform": 1}', "3"):
        with pytest.raises(ValueError, match="shard-1 describes no LiDB this version knows"):
            check_record(space_record(space) | {"targets": targets}, space, "shard-1")
