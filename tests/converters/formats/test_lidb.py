import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import prepare_conversion
from converters.formats.lidb import read_lidb_folder, read_theta
from lidb_peft import LiDBConfig, LiDBSpace, load_theta, save_theta


def write_theta(path, models, **changes):
    space = LiDBSpace(models, LiDBConfig(**({"down_dim": 3, "up_dim": 2} | changes)))
    theta = torch.randn(space.num_layers, space.row_size, generator=torch.Generator().manual_seed(0)) * space.mask
    save_theta(path, theta, space, "a-base")
    return load_theta(path, space).theta, space


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_layers_of_the_real_models_are_recognised_without_them(tmp_path, real_models, real_layers, family):
    theta, space = write_theta(tmp_path / "theta.safetensors", real_models(family))
    lora = read_theta(tmp_path / "theta.safetensors").to_lora()
    assert lora.family == family
    assert lora.metadata == {"ss_sd_model_name": "a-base"}
    assert lora.layers.keys() == real_layers(family).keys()
    # The first and last layers tell whether rows and layers go together; all of them would take seconds.
    expected = space.factors(theta)
    for name in (space.layer_names[0], space.layer_names[-1]):
        layer, (lora_A, lora_B) = lora.layers[name], expected[name]
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, lora_B @ lora_A)


def test_a_theta_of_some_models_or_layers_is_recognised(tmp_path, real_models):
    models = real_models("sd1")
    for number, (chosen, changes) in enumerate(
        [
            ({"unet": models["unet"]}, {}),
            ({"text_encoder": models["text_encoder"]}, {}),
            ({"unet": models["unet"]}, {"target_modules": ["attn2.to_k", "attn2.to_v"]}),
        ]
    ):
        file = tmp_path / f"{number}.safetensors"
        _, space = write_theta(file, chosen, **changes)
        assert set(read_theta(file).to_lora().layers) == set(space.layer_names)


def test_a_theta_of_an_unknown_model_asks_for_the_base(tmp_path):
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})
    write_theta(tmp_path / "theta.safetensors", {"unet": model}, target_modules=["to_q"])
    with pytest.raises(
        ValueError, match=r"layers of a-base that no family has \(sd1, sd2, sdxl, flux1\); pass the base model"
    ):
        read_theta(tmp_path / "theta.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_folder_is_recognised_by_the_bases_that_it_records(tmp_path, real_models, family):
    """The UNets of Stable Diffusion 1 and 2 have the same layer names and other widths."""
    theta, _ = write_theta(tmp_path / "theta.safetensors", {"unet": real_models(family)["unet"]}, down_dim=4)
    prepare_conversion(tmp_path / "theta.safetensors", tmp_path / "folder", "lidb").write()
    weights = read_lidb_folder(tmp_path / "folder")
    assert (weights.family, weights.base_model_name) == (family, "a-base")
    weights.save_theta(tmp_path / "again.safetensors")
    assert torch.equal(load_theta(tmp_path / "again.safetensors").theta, theta)
    again, first = ((tmp_path / name).stat().st_size for name in ("again.safetensors", "theta.safetensors"))
    assert again <= first  # float16 holds these numbers


def test_a_single_folder_of_peft_is_an_adapter_too(tmp_path, real_models):
    write_theta(tmp_path / "theta.safetensors", {"unet": real_models("sd1")["unet"]})
    prepare_conversion(tmp_path / "theta.safetensors", tmp_path / "folder", "lidb").write()
    (tmp_path / "folder/unet").rename(tmp_path / "mine")
    assert len(read_lidb_folder(tmp_path / "mine").to_lora().layers) == 128


def test_bases_of_its_own_reach_the_lora_but_no_theta_file(tmp_path, real_models):
    write_theta(tmp_path / "theta.safetensors", {"text_encoder": real_models("sd1")["text_encoder"]})
    prepare_conversion(tmp_path / "theta.safetensors", tmp_path / "folder", "lidb").write()
    plain = read_lidb_folder(tmp_path / "folder").to_lora()
    file = tmp_path / "folder/text_encoder/adapter_model.safetensors"
    state = load_file(file)
    del state["lidb_basis.down:768:3.record"]
    save_file(state | {"lidb_basis.down:768:3.values": torch.eye(768)[:3].contiguous()}, file)
    weights = read_lidb_folder(tmp_path / "folder")
    for name, layer in weights.to_lora().layers.items():
        assert not layer.lora_A[:, 3:].any()
        assert torch.equal(layer.lora_B, plain.layers[name].lora_B)
    with pytest.raises(ValueError, match="rank, scale and bases"):
        weights.save_theta(tmp_path / "again.safetensors")


def test_models_of_different_settings_cannot_share_a_theta_file(tmp_path, real_models):
    (tmp_path / "folder").mkdir()
    for seed, component in enumerate(("unet", "text_encoder")):
        write_theta(tmp_path / "theta.safetensors", {component: real_models("sd1")[component]}, seed=seed)
        prepare_conversion(tmp_path / "theta.safetensors", tmp_path / component, "lidb").write()
        (tmp_path / component / component).rename(tmp_path / "folder" / component)
    with pytest.raises(ValueError, match="the adapters differ in seed; one theta file cannot hold them"):
        read_lidb_folder(tmp_path / "folder").save_theta(tmp_path / "again.safetensors")


def test_layers_that_the_base_or_the_config_does_not_have_are_refused_by_name(tmp_path, real_models):
    models = real_models("sd1")
    targets = ["attn2.to_k", "attn2.to_v"]
    write_theta(tmp_path / "theta.safetensors", {"unet": models["unet"]}, target_modules=targets)
    prepare_conversion(tmp_path / "theta.safetensors", tmp_path / "folder", "lidb").write()
    with pytest.raises(ValueError, match=r"does not have: unet\..*to_k"):
        read_lidb_folder(tmp_path / "folder", {"text_encoder": models["text_encoder"]})
    (config,) = (tmp_path / "folder").rglob("adapter_config.json")
    config.write_text(config.read_text().replace('"attn2.to_v"', '"attn2.to_q"'))
    with pytest.raises(ValueError, match=r"layers that its config does not name.*to_v"):
        read_lidb_folder(tmp_path / "folder", {"unet": models["unet"]})
