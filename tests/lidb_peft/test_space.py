"""Layers, theta and per-sample weights of ``LiDBSpace``; gradient checkpointing has its own file."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lidb_peft import LiDBConfig
from lidb_peft.bases import BasisKey, get_basis
from lidb_peft.layout import distinct_basis_keys, split_theta
from lidb_peft.space import LiDBSpace

CONFIG = LiDBConfig(r=2, down_dim=28, up_dim=40, scale=0.5)  # wider than the text encoder's 24


@pytest.fixture
def models(new_unet, new_text_encoder):
    return {"unet": new_unet().requires_grad_(False), "text_encoder": new_text_encoder().requires_grad_(False)}


@pytest.fixture
def space(models):
    return LiDBSpace(models, CONFIG)


def random_theta(space, *batch, seed=0, std=0.2):
    noise = torch.randn(*batch, space.num_layers, space.row_size, generator=torch.Generator().manual_seed(seed))
    return space.theta_0 + std * noise * space.mask


def run(models, latents, timesteps, ids):
    return models["unet"](latents, timesteps, models["text_encoder"](ids)[0]).sample


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(4, 4, 8, 8, generator=generator),
        torch.tensor([3, 90, 400, 700]),
        torch.randint(0, 48, (4, 8), generator=generator),
    )


def merged(models, space, theta):
    """Copies of the models with the dense update added to the weights: an independent way to the same output."""
    copies = copy.deepcopy(models)
    r, a, b = CONFIG.r, CONFIG.down_dim, CONFIG.up_dim
    for row, name in zip(theta.double(), space.layer_names, strict=True):
        component, _, path = name.partition(".")
        if component == "text_encoder" and not any(
            n.startswith("text_model.") for n, _ in models[component].named_modules()
        ):
            path = path.removeprefix("text_model.")
        layer = copies[component].get_submodule(path)
        out_features, in_features = layer.weight.shape
        down, up = row[: r * a].view(r, a)[:, :in_features], row[r * a :].view(b, r)[:out_features]
        down_aux = get_basis(BasisKey("down", in_features, min(a, in_features), 0), torch.device("cpu")).double()
        up_aux = get_basis(BasisKey("up", out_features, min(b, out_features), 0), torch.device("cpu")).double()
        layer.weight.data += (CONFIG.scale * up_aux @ up @ down @ down_aux).float()
    return copies


def test_an_update_is_not_rounded_to_the_8_bits_that_weights_are_kept_in(models, inputs):
    latents, timesteps, ids = inputs
    kept, states = models["unet"], models["text_encoder"](ids)[0]
    if not hasattr(kept, "enable_layerwise_casting"):
        pytest.skip("this diffusers keeps no weights in 8 bits")
    whole = copy.deepcopy(kept)
    kept.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        for own, stored in zip(whole.parameters(), kept.parameters(), strict=True):
            own.copy_(stored.float())
    outputs = []
    for model in (kept, whole):
        space = LiDBSpace({"unet": model}, CONFIG)
        with space.apply(random_theta(space)):
            outputs.append(model(latents, timesteps, states).sample)
    torch.testing.assert_close(*outputs)


def test_stable_diffusion_15_has_the_papers_layers():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072))
    space = LiDBSpace({"unet": unet, "text_encoder": encoder}, LiDBConfig())
    assert space.num_layers == 176
    assert [name.partition(".")[0] for name in space.layer_names] == ["unet"] * 128 + ["text_encoder"] * 48
    assert space.mask.sum() == space.mask.numel() == 26_400
    assert space.lora_size(1) == 273_024  # rank-1 LoRA on the same layers
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert {f"{block}.attn2.to_k", f"{block}.attn1.to_out.0"} < set(space.layer_names)
    assert space.shapes[space.layer_names.index(f"{block}.attn2.to_k")] == (768, 1280)
    counts = [get_peft_model(model, LiDBConfig()).get_nb_trainable_parameters()[0] for model in (unet, encoder)]
    assert counts == [128 * 150, 48 * 150]


def test_stable_diffusion_2_has_its_220_layers():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=23, intermediate_size=4096)
        )
    space = LiDBSpace({"unet": unet, "text_encoder": encoder}, LiDBConfig())
    assert space.num_layers == 128 + 4 * 23
    assert space.mask.sum() == 33_000
    last = space.layer_names.index("text_encoder.text_model.encoder.layers.22.self_attn.v_proj")
    assert space.shapes[last] == (1024, 1024)


def test_sdxl_has_its_736_layers():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, num_attention_heads=20, num_hidden_layers=32)
        )
    space = LiDBSpace({"unet": unet, "text_encoder": first, "text_encoder_2": second}, LiDBConfig())
    assert space.num_layers == 560 + 48 + 128 == 736
    assert space.mask.sum() == 110_400
    assert "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj" in space.layer_names


def test_theta_0_is_shared_and_the_identity(models, space, inputs):
    with torch.no_grad():
        expected = run(models, *inputs)
        with space.apply(space.theta_0):
            assert torch.equal(run(models, *inputs), expected)
    assert torch.equal(space.theta_0, LiDBSpace(models, CONFIG).theta_0)
    down, up = space.theta_0[:, : 2 * 28], space.theta_0[:, 2 * 28 :]
    assert (up == 0).all()
    assert torch.allclose(down.norm(dim=1), torch.full((space.num_layers,), 2**0.5))
    assert not space.theta_0[~space.mask].any()


def test_narrow_layers_are_padded_with_dead_numbers(models, space, inputs):
    narrow = space.layer_names.index("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    down, up = space.mask[narrow, : 2 * 28].view(2, 28), space.mask[narrow, 2 * 28 :].view(40, 2)
    assert down.sum(1).tolist() == [24, 24]
    assert up.sum(0).tolist() == [24, 24]
    theta = random_theta(space).requires_grad_()
    with space.apply(theta):
        run(models, *inputs).square().sum().backward()
    assert not theta.grad[~space.mask].any()
    assert (theta.grad[space.mask] != 0).float().mean() > 0.99


def test_weights_equal_the_merged_model(models, space, inputs):
    theta = random_theta(space)
    with torch.no_grad():
        base = run(models, *inputs)
        with space.apply(theta):
            adapted = run(models, *inputs)
        assert torch.allclose(adapted, run(merged(models, space, theta), *inputs), atol=2e-5)
        assert not torch.allclose(adapted, base, atol=1e-3)
        assert torch.equal(run(models, *inputs), base)  # nothing stays behind


def test_factors_multiply_to_the_update_and_are_differentiable(space):
    theta = random_theta(space, 3).requires_grad_()
    factors = space.factors(theta)
    assert tuple(factors) == space.layer_names
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora_A, lora_B = factors[name]
    assert lora_A.shape == (3, 2, 24)
    assert lora_B.shape == (3, 32, 2)
    one_A, one_B = space.factors(theta[1])[name]
    assert torch.allclose(lora_B[1] @ lora_A[1], one_B @ one_A, atol=1e-6)
    (lora_B @ lora_A).sum().backward()
    index = space.layer_names.index(name)
    assert theta.grad[:, index].any()
    assert not theta.grad[:, :index].any()


def test_a_batch_equals_one_at_a_time(models, space, inputs):
    thetas = random_theta(space, 4).requires_grad_()
    with space.apply(thetas):
        together = run(models, *inputs)
    together.square().mean(dim=(1, 2, 3)).sum().backward()
    for i in range(4):
        theta = thetas.detach()[i].clone().requires_grad_()
        with space.apply(theta):
            alone = run(models, *(part[i : i + 1] for part in inputs))
        alone.square().mean().backward()
        assert torch.allclose(alone[0], together[i], atol=1e-5)
        assert (theta.grad - thetas.grad[i]).norm() <= 1e-5 * theta.grad.norm()


def test_several_samples_of_an_identity_are_neighbours(models, space, inputs):
    thetas = random_theta(space, 2)
    with torch.no_grad(), space.apply(thetas):
        pairs = run(models, *inputs)
    with torch.no_grad(), space.apply(thetas.repeat_interleave(2, dim=0)):
        assert torch.allclose(pairs, run(models, *inputs), atol=1e-5)
    with space.apply(random_theta(space, 3)), pytest.raises(ValueError, match="4 samples for 3 identities"):
        run(models, *inputs)


def test_strength_is_a_number_or_one_for_each_identity(models, space, inputs):
    theta = random_theta(space)
    with torch.no_grad():
        expected = []
        for scale in (0.0, 0.4, 1.0, -1.0):
            with space.apply(theta, scale=scale):
                expected.append(run(models, *inputs)[len(expected)])
        with space.apply(theta.expand(4, -1, -1), scale=torch.tensor([0.0, 0.4, 1.0, -1.0])):
            assert torch.allclose(run(models, *inputs), torch.stack(expected), atol=1e-5)


def test_a_frozen_theta_and_a_trainable_lora_together(models, space, inputs):
    theta = random_theta(space)
    generator = torch.Generator().manual_seed(0)
    fresh = space.init_lora(3, generator)
    assert fresh.shape == (space.lora_size(3),)
    with torch.no_grad():
        with space.apply(theta):
            expected = run(models, *inputs)
        with space.apply(space.expand(theta), space.split_lora(fresh, 3)):
            assert torch.allclose(run(models, *inputs), expected, atol=1e-5)  # lora_B is zero
    flat = (fresh + 0.05 * torch.randn(4, space.lora_size(3), generator=generator)).requires_grad_()
    with space.apply(space.expand(theta), space.split_lora(flat, 3)):
        stacked = run(models, *inputs)
    stacked.square().sum().backward()
    assert flat.grad.abs().min(dim=1).values.min() >= 0
    assert (flat.grad != 0).float().mean() > 0.99
    with torch.no_grad(), space.apply(space.factors(theta), space.lora_factors(flat, 3)):
        assert torch.allclose(run(models, *inputs), stacked, atol=1e-5)
    for name, (lora_A, lora_B) in space.lora_factors(fresh, 3).items():
        assert lora_A.abs().max() <= lora_A.shape[1] ** -0.5, name
        assert not lora_B.any(), name


def test_theta_and_peft_adapters_convert_both_ways(models, inputs, new_unet, new_text_encoder):
    space = LiDBSpace(models, CONFIG)
    theta = random_theta(space)
    with torch.no_grad(), space.apply(theta):
        expected = run(models, *inputs)
    with pytest.raises(ValueError, match="no LiDB adapter called 'default' on"):
        space.theta_from_adapters()
    wrapped = {name: get_peft_model(model, CONFIG) for name, model in models.items()}
    assert torch.equal(space.theta_from_adapters(), space.theta_0)
    space.load_into_adapters(theta)
    assert torch.equal(space.theta_from_adapters(), theta)
    with torch.no_grad():
        assert torch.allclose(run(wrapped, *inputs), expected, atol=1e-5)
    again = LiDBSpace(wrapped, CONFIG)
    assert again.layers_hash == space.layers_hash
    other = LiDBSpace(wrapped, LiDBConfig(r=2, down_dim=28, up_dim=40, scale=0.5, seed=1))
    with pytest.raises(ValueError, match="this space has"):
        other.theta_from_adapters()


def test_half_precision_models_cast_the_factors(models, space, inputs):
    latents, timesteps, ids = inputs
    theta = random_theta(space)
    with torch.no_grad(), space.apply(theta):
        expected = run(models, *inputs)
    for model in models.values():
        model.to(torch.bfloat16)
    leaf = theta.clone().requires_grad_()
    with space.apply(leaf):
        result = run(models, latents.bfloat16(), timesteps, ids)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() < 0.05 * expected.norm()
    result.float().square().sum().backward()
    assert leaf.grad.dtype == torch.float32
    assert leaf.grad.isfinite().all()


def test_hooks_go_with_the_space_and_copies_are_free_of_it(models, inputs):
    count = sum(len(m._forward_hooks) for model in models.values() for m in model.modules())
    space = LiDBSpace(models, CONFIG)
    copies = copy.deepcopy(models)
    with torch.no_grad():
        base = run(models, *inputs)
        with space.apply(random_theta(space)):
            assert torch.equal(run(copies, *inputs), base)
    del space
    gc.collect()
    assert sum(len(m._forward_hooks) for model in models.values() for m in model.modules()) == count


def test_no_global_generator_is_touched(models):
    before = torch.get_rng_state()
    space = LiDBSpace(models, LiDBConfig(down_dim=11, up_dim=7, seed=1234))
    space.factors(space.theta_0)
    space.init_lora(2, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_weights_are_refused_in_words(space):
    row = space.row_size
    with pytest.raises(ValueError, match=rf"this space takes \(\.\.\., {space.num_layers}, {row}\)"):
        space.factors(torch.zeros(3, row))
    with pytest.raises(ValueError, match="pass one axis of identities"), space.apply(random_theta(space, 2, 2)):
        pass
    with pytest.raises(ValueError, match="apply needs theta or factors"), space.apply():
        pass
    with pytest.raises(ValueError, match="the flat LoRA has 5 numbers; rank 2"):
        space.split_lora(torch.zeros(5), 2)
    factors = space.factors(space.theta_0)
    name = space.layer_names[0]
    with (
        pytest.raises(ValueError, match=f"missing \\['{name}'\\]"),
        space.apply({k: factors[k] for k in factors if k != name}),
    ):
        pass
    with pytest.raises(ValueError, match=f"the factors of {space.layer_names[-1]} have shapes"):
        space.apply({**factors, space.layer_names[-1]: factors[name]}).__enter__()
    with pytest.raises(ValueError, match="pass one identity's"):
        space.load_into_adapters(random_theta(space, 2))
    with pytest.raises(ValueError, match="needs at least one model"):
        LiDBSpace({}, CONFIG)
    with pytest.raises(ValueError, match="no layer of unet matches"):
        LiDBSpace({"unet": nn.Linear(2, 2)}, LiDBConfig(target_modules=["to_q"]))


def test_learned_bases_take_the_place_of_the_frozen_ones(space):
    generator = torch.Generator().manual_seed(0)
    keys = distinct_basis_keys(space.shapes, CONFIG)
    bases = {key.label: torch.randn(key.shape, generator=generator).requires_grad_() for key in keys}
    theta = random_theta(space, 2)
    factors = space.factors(theta, bases)
    for index, name in enumerate(space.layer_names):
        (down, up), (down_key, up_key) = split_theta(theta[:, index], CONFIG), space.basis_keys(index)
        lora_A, lora_B = factors[name]
        expected_A = down[..., : down_key.dim] @ bases[down_key.label]
        expected_B = CONFIG.scale * bases[up_key.label] @ up[:, : up_key.dim]
        assert torch.allclose(lora_A, expected_A, rtol=1e-4, atol=1e-5)
        assert torch.allclose(lora_B, expected_B, rtol=1e-4, atol=1e-5)
    sum(lora_A.sum() + lora_B.sum() for lora_A, lora_B in factors.values()).backward()
    assert all(basis.grad.abs().sum() > 0 for basis in bases.values())
    label = keys[0].label
    for wrong in ({}, bases | {label: torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="the learned bases have no"):
            space.expand(theta, wrong)


def test_a_model_compiles_as_one_graph_and_reads_new_weights(new_text_encoder, inputs):
    """The hooks are a part of the graph, and a change of theta compiles nothing anew."""
    models = {"text_encoder": new_text_encoder(num_hidden_layers=1).requires_grad_(False)}
    space, compilations = LiDBSpace(models, CONFIG), []

    def backend(graph, examples):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(models["text_encoder"], backend=backend, fullgraph=True)
    for seed in range(3):
        with space.apply(random_theta(space, seed=seed)):
            expected = models["text_encoder"](inputs[2])[0]
            assert torch.allclose(compiled(inputs[2])[0], expected, atol=1e-6)
    assert len(compilations) == 1
