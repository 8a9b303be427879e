"""The hypernetwork on the miniature's layers, with tiny random encoders.

Docstrings say which failure of other re-implementations of HyperDreamBooth a test keeps out.
"""

import inspect
import json
import logging.handlers

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PretrainedConfig,
    ResNetConfig,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging as transformers_logging

from hypernet.network.config import HyperNetworkConfig
from hypernet.network.encoder import prepare_pictures
from hypernet.network.hypernetwork import HyperNetwork, read_config
from lidb_peft import LiDBConfig, LiDBSpace, squared_distance
from lidb_peft.layout import split_theta

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
ENCODERS = {
    "vit": ViTConfig(intermediate_size=24, **TINY),
    "clip": CLIPVisionConfig(intermediate_size=24, **TINY),
    "dinov2": Dinov2Config(mlp_ratio=2, **TINY),
}
DECODER = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "k": 2}
# Wider than the miniature's narrowest layers, so that there is padding.
LIDB = LiDBConfig(r=2, down_dim=70, up_dim=10, scale=0.5, seed=3)


@pytest.fixture(scope="module")
def padded_space(base):
    space = LiDBSpace(base.adapted, LIDB)
    assert not space.mask.all()
    return space


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(space, encoder="vit", seed=0, **options):
    config = HyperNetworkConfig.for_space(space, ENCODERS[encoder], "mini", **DECODER | options)
    return HyperNetwork(config, seed=seed)


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_vision_transformer_predicts_thetas_with_zeros_in_the_padding(padded_space, pixels, encoder):
    net = make(padded_space, encoder).eval()
    theta = net(pixels)
    assert theta.shape == (2, padded_space.num_layers, padded_space.row_size)
    assert theta.dtype == torch.float32
    assert (theta[:, ~padded_space.mask] == 0).all()
    assert (theta != padded_space.theta_0)[:, padded_space.mask].float().mean() > 0.99
    assert not torch.equal(theta[0], theta[1])
    assert torch.allclose(net(pixels[1:])[0], theta[1], atol=1e-6)  # nobody depends on who shares the batch


def test_the_first_gradient_reaches_both_halves_of_theta_and_everything_before(base, space, taught, pixels):
    """With both factors starting at zero, or heads of zeros, the gradients were zero for ever."""
    net = make(space, train_encoder=True)
    noisy, target = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).unbind()
    prompts = base.prepare_prompts([net.config.trigger] * 2)
    with space.apply(space.expand(net(pixels))):
        answer = base.denoise(noisy, torch.tensor([100, 700]), base.encode_prompts(prompts))
    (answer - target).square().mean().backward()
    layers = [space.layer_names.index(name) for name in taught]
    for half in split_theta(net.heads.weight.grad[layers], space.config):
        assert (half.flatten(1).norm(dim=1) > 0).all()
    zero = [name for name, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [name for name in zero if not name.endswith(("k_proj.bias", "key.bias"))] == []  # softmax ignores those


def test_it_learns_to_tell_two_people_apart(space, pixels):
    net = make(space)
    noise = torch.randn(2, *space.theta_0.shape, generator=torch.Generator().manual_seed(2))
    target = space.theta_0 + 0.1 * noise * space.mask
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = squared_distance(space, net(pixels), target).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_the_global_generator_is_left_alone(padded_space, pixels, tmp_path):
    """A module that seeded it gave every training step the same noise and timestep."""
    before = torch.get_rng_state()
    net = make(padded_space)
    net(pixels)
    net.save_pretrained(tmp_path)
    HyperNetwork.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert equal_states(make(padded_space), net)
    other = make(padded_space, seed=1)
    assert not torch.equal(other.heads.weight, net.heads.weight)
    assert not equal_states(other.encoder, net.encoder)


@pytest.mark.parametrize(("encoder", "learned"), [("vit", False), ("clip", True), ("dinov2", False)])
def test_a_folder_brings_everything_back_to_the_last_bit(padded_space, pixels, tmp_path, encoder, learned):
    """Seeds, the order of layers or k were not in the checkpoint, and the export used others."""
    options = {"k": 3, "learned_bases": learned, "train_encoder": learned, "prompt": "[V], a portrait"}
    net = make(padded_space, encoder, token="ohwx", **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)  # not what the constructor draws
    net.save_pretrained(tmp_path / "net")
    assert {file.name for file in (tmp_path / "net").iterdir()} == {"config.json", "model.safetensors"}
    loaded = HyperNetwork.from_pretrained(tmp_path / "net")
    assert equal_states(loaded, net)
    assert torch.equal(loaded(pixels), net(pixels))
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in net.parameters()]
    config = loaded.config
    assert [name for name, *_ in config.layers] == list(padded_space.layer_names)
    assert config.lidb == LIDB
    assert (config.k, config.learned_bases, config.trigger) == (3, learned, "ohwx, a portrait")
    assert list(inspect.signature(net.forward).parameters) == ["pixels", "return_rounds"]
    loaded.check_space(padded_space)


def test_half_precision_is_for_the_file_only(padded_space, tmp_path):
    net = make(padded_space)
    net.save_pretrained(tmp_path / "full")
    net.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = HyperNetwork.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.heads.weight, net.heads.weight.half().float())
    loaded.check_space(padded_space)
    assert net.heads.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, r"was made with seed 3 \(here 4\); use its own settings"),
        ({"down_dim": 69}, r"was made with down_dim 70 \(here 69\)"),
        ({"scale": 1.0}, r"was made with scale 0.5 \(here 1.0\)"),
        ({"target_modules": ["to_q", "q_proj"]}, "belongs to another list of 176 layers"),
    ],
)
def test_another_space_is_refused(base, padded_space, changes, message):
    settings = {"r": 2, "down_dim": 70, "up_dim": 10, "scale": 0.5, "seed": 3} | changes
    with pytest.raises(ValueError, match=message):
        make(padded_space).check_space(LiDBSpace(base.adapted, LiDBConfig(**settings)))


def test_other_bases_and_another_start_are_refused_and_other_weights_are_a_warning(base, padded_space):
    net = make(padded_space)
    bases = json.loads(net.config.record["bases"])
    label = next(iter(bases))
    broken = {**bases, label: ["0" * 16, *bases[label][1:]]}
    net.config.record["bases"] = json.dumps(broken)
    with pytest.raises(ValueError, match=f"the hypernetwork was made with another {label} basis"):
        net.check_space(padded_space)
    net = make(padded_space)
    net.theta_0[0, 0] += 1e-3
    with pytest.raises(ValueError, match="starts at another theta_0 than this space"):
        net.check_space(padded_space)
    with pytest.raises(ValueError, match="was cast to half precision; load it again, in float32"):
        make(padded_space).half().check_space(padded_space)
    net = make(padded_space)
    net.config.record["base_fingerprint"] = net.config.record["base_fingerprint"].replace("0.", "1.")
    with pytest.warns(UserWarning, match="was made on mini, whose weights differ"):
        net.check_space(padded_space)


def test_its_own_config_rebuilds_its_space(base, padded_space):
    config = LiDBConfig(down_dim=20, up_dim=10, target_modules=["to_q", "q_proj"])
    net = make(LiDBSpace(base.adapted, config))
    net.check_space(LiDBSpace(base.adapted, net.config.lidb))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_was_loaded_is_saved_as_the_same_bytes(padded_space, tmp_path):
    """A training that is resumed leaves what an unbroken one leaves."""
    save_encoder(ENCODERS["vit"], tmp_path / "vit")
    HyperNetwork.from_encoder(tmp_path / "vit", padded_space, **DECODER).save_pretrained(tmp_path / "first")
    HyperNetwork.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_damaged_folder_is_refused_in_words(padded_space, tmp_path):
    folder = tmp_path / "net"
    make(padded_space).save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1), theta_1=tensors.pop("theta_0")))
    with pytest.raises(ValueError, match=r"missing theta_0, unexpected extra, theta_1"):
        HyperNetwork.from_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.update({"heads.weight": tensors["heads.weight"].mT.contiguous()}))
    with pytest.raises(ValueError, match=r"holds other weights than its config\.json says"):
        HyperNetwork.from_pretrained(folder)


@pytest.mark.parametrize("read", [HyperNetwork.from_pretrained, read_config])
def test_damage_that_shows_without_the_weights_is_found_without_them(padded_space, tmp_path, read):
    folder = tmp_path / "net"
    make(padded_space).save_pretrained(folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())

    def rewrite_config(**changes):
        (folder / "config.json").write_text(json.dumps(config | changes))

    rewrite_config(layers=config["layers"][::-1])
    with pytest.raises(ValueError, match=r"layers is not the one of the record"):
        read(folder)
    rewrite_config(record=config["record"] | {"basis": "unheard of"})
    with pytest.raises(ValueError, match="net describes no LiDB this version knows: basis is 'unheard of'"):
        read(folder)
    rewrite_config(model_type="vit")
    with pytest.raises(ValueError, match="holds a model of type 'vit'; expected 'lidb_hypernetwork'"):
        read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read(folder)
    rewrite_config()
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        read(folder)
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors is a file; name the folder"):
        read(weights)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors"):
        read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        read(folder)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the Hugging Face hub"):
        read(tmp_path / "none")


def test_the_config_is_read_without_the_weights(padded_space, tmp_path, monkeypatch):
    make(padded_space, token="ohwx", k=3, learned_bases=True).save_pretrained(tmp_path)
    loaded = HyperNetwork.from_pretrained(tmp_path).config
    monkeypatch.setattr(HyperNetwork, "__init__", lambda *_: pytest.fail("a network was made"))
    assert read_config(tmp_path).to_dict() == loaded.to_dict()
    assert read_config(tmp_path).name_or_path == str(tmp_path)


def test_a_save_that_fails_leaves_the_last_one(padded_space, pixels, tmp_path, monkeypatch):
    make(padded_space).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        make(padded_space, seed=1).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"hidden_size": 25}, "hidden_size is 25; choose a multiple of num_attention_heads, 2"),
        ({"prompt": "a face"}, r"it must hold \[V\]"),
    ],
)
def test_impossible_configs_are_refused(padded_space, options, message):
    with pytest.raises(ValueError, match=message):
        make(padded_space, **options)


def test_at_first_all_rounds_say_the_same(padded_space, pixels):
    net = make(padded_space, k=3).eval()
    with torch.no_grad():
        predictions = net(pixels, return_rounds=True)
    assert torch.equal(predictions[0], predictions[2])
    assert (predictions[0] - net.theta_0).abs().max() > 1e-4  # and something: the embedding learns from the first step


def test_each_round_is_fed_the_last_prediction(padded_space, pixels):
    """Equation 3: theta_k = T(F, theta_(k-1)), from zeros on, with the features of a single look at the photos."""
    net = make(padded_space, k=3).eval()
    torch.nn.init.normal_(net.prediction_embedding.weight, generator=torch.Generator().manual_seed(4))
    looks, fed = [], []
    net.encoder.register_forward_hook(lambda module, args, kwargs, out: looks.append(kwargs["pixel_values"].shape),
                                      with_kwargs=True)  # fmt: skip
    net.prediction_embedding.register_forward_hook(lambda module, args, out: fed.append((args[0], out)))
    with torch.no_grad():
        theta = net(pixels)
        assert looks == [(2, 3, 16, 16)]
        assert not fed[0][0].any()
        assert not fed[0][1].any()
        predictions = net(pixels, return_rounds=True)
        assert torch.equal(predictions[2], theta)
        for rounds in (1, 2):
            assert torch.allclose(fed[rounds][0], predictions[rounds - 1] - net.theta_0, atol=1e-6)
            net.config.k = rounds
            shorter = net(pixels)
            assert torch.equal(shorter, predictions[rounds - 1])
            assert not torch.allclose(theta, shorter, atol=1e-6)


def test_several_photos_are_averaged(padded_space, pixels):
    net = make(padded_space).eval()
    with torch.no_grad():
        pair = pixels[None]
        assert torch.allclose(net(pair), net(pair.flip(1)), atol=1e-6)
        assert torch.allclose(net(torch.stack([pixels, pixels], dim=1)), net(pixels), atol=1e-6)
        net.photo_projection = nn.Identity()
        assert torch.allclose(net.encode(pair)[0], net.encode(pixels).mean(dim=0), atol=1e-6)
    for shape in [(3, 20, 20), (2, 1, 20, 20), (1, 1, 2, 3, 20, 20)]:
        with pytest.raises(ValueError, match="pixels have shape"):
            net(torch.zeros(shape))


@pytest.mark.parametrize("side", [9, 16, 40])
def test_pictures_are_prepared_as_image_processors_do(side):
    generator = torch.Generator().manual_seed(side)
    picture = torch.randint(60, 196, (side, side, 3), generator=generator, dtype=torch.uint8)  # no overshoot to cut
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    prepared = prepare_pictures(picture.permute(2, 0, 1)[None] / 127.5 - 1, 16, mean, std)[0]
    resized = Image.fromarray(picture.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    expected = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(16, 16, 3) / 255
    levels = (prepared.permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean) - expected).abs().max() * 255
    assert levels < 1.1  # Pillow rounds after each of its two passes
    black = prepare_pictures(torch.full((1, 3, side, side), -1.0), 16, mean, std)
    assert torch.allclose(black, -(torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).expand_as(black))


def test_a_frozen_encoder_stays_as_it_is(padded_space, pixels):
    net = make(padded_space).train()
    assert not net.encoder.training
    assert net.decoder[0].training
    net(pixels).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in net.encoder.parameters())
    assert all(p.grad is not None for name, p in net.named_parameters() if not name.startswith("encoder."))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_trainable_parameter_takes_part(padded_space, pixels, encoder):
    """One that does not would stop distributed training."""
    net = make(padded_space, encoder, train_encoder=True, learned_bases=True).train()
    assert net.encoder.training
    squared_distance(padded_space, net(pixels), padded_space.theta_0, bases=net.bases).sum().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    assert len(gradients(net.encoder)) > 20


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(padded_space, pixels, reentrant):
    """With it there were no gradients at all."""
    net = make(padded_space, train_encoder=True, k=3).train()
    calls = []
    net.decoder[0].register_forward_pre_hook(lambda *_: calls.append(1))
    (net(pixels) ** 2).sum().backward()
    plain, plain_calls = gradients(net), len(calls)
    net.zero_grad()
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (net(pixels) ** 2).sum().backward()
    checkpointed = gradients(net)
    assert len(calls) == plain_calls + 2 * 3  # each round once more
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_attention_is_sdpa(padded_space, pixels, monkeypatch):
    net = make(padded_space, train_encoder=True).train()
    original, calls = nn.functional.scaled_dot_product_attention, []

    def count(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    net(pixels)
    assert len(calls) == 2 + 2  # the encoder's layers, and the decoder's one in two rounds


def test_autocast_keeps_theta_in_float32(padded_space, pixels):
    net = make(padded_space).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theta = net(pixels)
        half = make(padded_space).eval()
        half.encoder.bfloat16()
        mixed = half(pixels)
    expected = net(pixels) - net.theta_0
    for found in (theta, mixed):
        assert found.dtype == torch.float32
        assert (found - net.theta_0 - expected).norm() < 0.03 * expected.norm()
        assert torch.equal(found[..., -1] * ~net.mask[..., -1], torch.zeros_like(found[..., -1]))


def test_learned_bases_start_at_the_frozen_ones_and_leave_in_the_lora(base, padded_space, pixels):
    """The exported factors are the update that was used; nobody had compared them."""
    net = make(padded_space, learned_bases=True).eval()
    theta = net(pixels).detach()
    frozen, learned = padded_space.factors(theta), padded_space.factors(theta, net.bases)
    assert all(torch.allclose(frozen[name][side], learned[name][side], atol=1e-6) for name in frozen for side in (0, 1))
    with torch.no_grad():
        for index, basis in enumerate(net.bases.values()):
            basis.add_(0.1 * torch.randn(basis.shape, generator=torch.Generator().manual_seed(index)))
    lora = padded_space.factors(theta[0], net.bases)
    ids = base.prepare_prompts([net.config.trigger])
    with torch.no_grad():
        with padded_space.apply(padded_space.expand(theta[0], net.bases)):
            used = base.encode_prompts(ids).prompt_embeds
        with padded_space.apply(lora):
            exported = base.encode_prompts(ids).prompt_embeds
        with padded_space.apply(theta[0]):
            by_frozen = base.encode_prompts(ids).prompt_embeds
    assert torch.equal(used, exported)
    assert not torch.allclose(used, by_frozen, atol=1e-4)
    assert make(padded_space).bases is None


def save_encoder(config: PretrainedConfig, folder, **processor):
    with torch.random.fork_rng():
        model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def test_a_pretrained_encoder_brings_its_weights_and_its_pictures(padded_space, pixels, tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 20}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=ENCODERS["clip"].to_dict())
    processor = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16},
                 "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}  # fmt: skip
    both = save_encoder(config, tmp_path / "clip", **processor).eval()
    before = torch.get_rng_state()
    net = HyperNetwork.from_encoder(tmp_path / "clip", padded_space, "mini", **DECODER).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert net.config.image_size == 16
    assert (net.config.image_mean, net.config.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert not [name for name, _ in net.named_parameters() if "text" in name]
    assert str(tmp_path) not in net.config.to_json_string()
    pictures = prepare_pictures(pixels, 16, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    net.photo_projection = nn.Identity()
    with torch.no_grad():
        assert torch.equal(net.encode(pixels), both.vision_model(pixel_values=pictures).last_hidden_state)


def test_a_pooler_that_an_encoder_was_saved_without_is_not_missed(padded_space, tmp_path):
    ViTModel(ENCODERS["vit"], add_pooling_layer=False).save_pretrained(tmp_path)
    told, before = logging.handlers.BufferingHandler(100), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    transformers_logging.add_handler(told)
    try:
        HyperNetwork.from_encoder(tmp_path, padded_space, **DECODER)
        assert told.buffer == []
        assert transformers_logging.get_verbosity() == logging.WARNING
    finally:
        transformers_logging.remove_handler(told)
        transformers_logging.set_verbosity(before)


def test_other_encoders_are_refused_in_words(padded_space, tmp_path):
    save_encoder(ENCODERS["vit"], tmp_path / "vit")
    net = HyperNetwork.from_encoder(tmp_path / "vit", padded_space, **DECODER)
    assert (net.config.image_size, net.config.image_mean) == (16, [0.5, 0.5, 0.5])
    rewrite(tmp_path / "vit", lambda tensors: tensors.pop("layernorm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weights of its encoder, e\.g\. layernorm\.weight"):
        HyperNetwork.from_encoder(tmp_path / "vit", padded_space)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the Hugging Face hub"):
        HyperNetwork.from_encoder(tmp_path / "none", padded_space)
    save_encoder(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]), tmp_path / "resnet")
    with pytest.raises(ValueError, match="the encoder is a 'resnet'; choose a vision transformer"):
        HyperNetwork.from_encoder(tmp_path / "resnet", padded_space)
