import pytest
import torch
from safetensors.torch import save_file

from converters.arithmetic.checkpoint import find_weights
from converters.arithmetic.project import family_models, lora_updates, model_updates, project, project_to_file
from converters.formats.kohya import save_kohya
from converters.layer import LoraLayer
from converters.lora import Lora
from converters.metadata import KohyaMetadata
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.bases import get_basis
from lidb_peft.theta import load_theta

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FEED_FORWARD = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"


@pytest.fixture
def space():
    block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 12), "to_k": torch.nn.Linear(8, 12)})
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    model = block
    for part in reversed(path.split(".")):
        model = torch.nn.ModuleDict({part: model})
    return LiDBSpace({"unet": model}, LiDBConfig(down_dim=6, up_dim=4, target_modules=["to_q", "to_k"]))


def random_lora(rank=3, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(rank, 16, generator=generator), torch.randn(12, rank, generator=generator)
    wide = LoraLayer(torch.randn(1, 5), torch.randn(4, 1), 1.0)
    return Lora({Q: LoraLayer(down, up, scale * rank), FEED_FORWARD: wide})


def nearest(update, space):
    """The nearest rank-1 update inside the bases, by projecting the dense matrix and its full SVD."""
    down, up = (basis.double() for basis in bases(space))
    core = up.T @ update @ down.T
    left, singular, right = torch.linalg.svd(core)
    return up @ (left[:, :1] * singular[:1] @ right[:1]) @ down


def bases(space):
    return (get_basis(key, torch.device("cpu")) for key in space.basis_keys(space.layer_names.index(Q)))


def test_a_loras_theta_is_the_nearest_and_says_what_it_misses(space):
    lora = random_lora()
    found = project(lora_updates(lora), space)
    update = 2.0 * (lora.layers[Q].lora_B.double() @ lora.layers[Q].lora_A.double())
    expected = nearest(update, space)
    lora_A, lora_B = space.factors(found.theta)[Q]
    assert (lora_B.double() @ lora_A.double() - expected).norm() < 1e-5 * expected.norm()
    assert found.errors == pytest.approx({Q: ((update - expected).norm() / update.norm()).item()}, rel=1e-5)
    assert found.left_out == (FEED_FORWARD,)
    other = 1 - space.layer_names.index(Q)
    assert torch.equal(found.theta[other], space.theta_0[other])


def test_bases_that_hold_an_update_miss_none_of_it(space):
    layer = random_lora(rank=1, scale=1.0).layers[Q]
    down_key, up_key = space.basis_keys(space.layer_names.index(Q))
    generator = torch.Generator().manual_seed(3)
    bases = {
        down_key.label: torch.cat([layer.lora_A, torch.randn(5, 16, generator=generator)]),
        up_key.label: torch.cat([layer.lora_B, torch.randn(12, 3, generator=generator)], dim=1),
    }
    assert project(lora_updates(Lora({Q: layer})), space, bases).errors[Q] < 1e-6
    assert project(lora_updates(Lora({Q: layer})), space).errors[Q] > 0.5


def test_two_models_theta_is_that_of_their_difference(space, tmp_path):
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    base, update = torch.randn(12, 16), torch.randn(12, 16)
    for file, weight in (("base", base), ("tuned", base + update)):
        save_file({name: weight, "first_stage_model.x": torch.ones(1)}, tmp_path / f"{file}.safetensors")
    weights = (find_weights(tmp_path / f"{file}.safetensors") for file in ("tuned", "base"))
    found = project(model_updates(*weights), space)
    expected = nearest(update.double(), space)
    lora_A, lora_B = space.factors(found.theta)[Q]
    assert (lora_B.double() @ lora_A.double() - expected).norm() < 1e-4 * expected.norm()


def test_norms_in_which_two_models_differ_are_left_out(space, tmp_path):
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0"
    for file in ("base", "tuned"):
        tensors = {f"{block}.attn1.to_q.weight": torch.randn(12, 16), f"{block}.norm1.weight": torch.randn(16)}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    weights = (find_weights(tmp_path / f"{file}.safetensors") for file in ("tuned", "base"))
    found = project(model_updates(*weights), space)
    assert found.errors.keys() == {Q}
    assert found.left_out == ("unet.mid_block.attentions.0.transformer_blocks.0.norm1",)


@pytest.mark.parametrize(("family", "num_layers"), [("sd1", 176), ("sdxl", 736)])
def test_a_familys_models_are_there_without_a_base(family, num_layers):
    assert LiDBSpace(family_models(family, "a"), LiDBConfig(down_dim=4, up_dim=2)).num_layers == num_layers


def test_a_theta_that_became_a_lora_comes_back(space, tmp_path):
    noise = torch.randn(space.theta_0.shape, generator=torch.Generator().manual_seed(2))
    factors = space.factors(space.theta_0 + noise)
    save_kohya(tmp_path / "lora.safetensors", factors, KohyaMetadata(), torch.float32)
    out = tmp_path / "theta.safetensors"
    found = project_to_file(tmp_path / "lora.safetensors", out, models=space.models, config=space.config)
    assert max(found.errors.values()) < 1e-3
    again = space.factors(load_theta(out, space).theta)  # float16, as theta files are
    for name, (lora_A, lora_B) in factors.items():
        update = lora_B @ lora_A
        assert (again[name][1] @ again[name][0] - update).norm() < 2e-3 * update.norm()


def test_a_lora_that_does_not_tell_its_family_is_refused(tmp_path):
    factors = {Q: (torch.ones(1, 16), torch.ones(12, 1))}
    diffusers = {f"{Q}.lora_{side}.weight": tensor for side, tensor in zip("AB", factors[Q], strict=True)}
    save_file(diffusers, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors does not say its model family"):
        project_to_file(tmp_path / "lora.safetensors", tmp_path / "theta.safetensors")


def test_what_has_no_theta_is_refused(space):
    lora = random_lora()
    with pytest.raises(ValueError, match="none of 1 updates is on a layer that LiDB adapts"):
        project(lora_updates(Lora({FEED_FORWARD: lora.layers[FEED_FORWARD]})), space)
    dora = LoraLayer(*lora.layers[Q].tensors(), 1.0, torch.ones(12))
    with pytest.raises(ValueError, match="is DoRA"):
        project(lora_updates(Lora({Q: dora})), space)
