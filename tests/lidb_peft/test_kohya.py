"""The network module of sd-scripts, driven as train_network.py and sdxl_train_network.py drive it."""

import argparse
import hashlib
import importlib
import math

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from converters.formats.kohya import load_kohya, save_kohya
from converters.metadata import KohyaMetadata
from lidb_peft import LiDBConfig, LiDBSpace, base_fingerprint, load_theta

NETWORK_ARGS = ["down_dim=12", "up_dim=10"]
METADATA = {"ss_sd_model_name": "tiny.safetensors", "ss_network_dim": "None", "ss_steps": "3", "modelspec.title": "me"}


class SgmUNet(nn.Module):
    """A diffusers UNet whose layers have the places that they have in sd-scripts' SdxlUNet2DConditionModel."""

    def __init__(self, unet):
        super().__init__()
        self.run = [unet]  # in a list, so that its own names are no part of this module
        act = nn.SiLU()
        embedding, added = unet.time_embedding, unet.add_embedding
        self.time_embed = nn.Sequential(embedding.linear_1, act, embedding.linear_2)
        self.label_emb = nn.Sequential(nn.Sequential(added.linear_1, act, added.linear_2))
        self.input_blocks = nn.ModuleList([nn.Sequential(unet.conv_in)])
        self.output_blocks = nn.ModuleList()
        for block in unet.down_blocks:
            self.input_blocks.extend(nn.ModuleList(pair) for pair in self.pairs(block))
            for sampler in block.downsamplers or []:
                self.input_blocks.append(nn.ModuleList([nn.ModuleDict({"op": sampler.conv})]))
        mid = unet.mid_block
        self.middle_block = nn.ModuleList([self.resnet(mid.resnets[0]), mid.attentions[0], self.resnet(mid.resnets[1])])
        for block in unet.up_blocks:
            self.output_blocks.extend(nn.ModuleList(pair) for pair in self.pairs(block))
            self.output_blocks[-1].extend(block.upsamplers or [])
        self.out = nn.Sequential(unet.conv_norm_out, act, unet.conv_out)

    def pairs(self, block):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            yield [self.resnet(resnet)] + ([] if attention is None else [attention])

    @staticmethod
    def resnet(block):
        parts = {
            "in_layers": nn.Sequential(block.norm1, nn.SiLU(), block.conv1),
            "emb_layers": nn.Sequential(nn.SiLU(), block.time_emb_proj),
            "out_layers": nn.Sequential(block.norm2, nn.SiLU(), nn.Dropout(), block.conv2),
        }
        return nn.ModuleDict(parts | ({"skip_connection": block.conv_shortcut} if block.conv_shortcut else {}))

    def forward(self, latents, timesteps, context, pooled):
        added = {"text_embeds": pooled, "time_ids": torch.ones(len(latents), 6)}
        return self.run[0](latents, timesteps, context, added_cond_kwargs=added)


class Base:
    """A tiny base model as sd-scripts has it: a UNet, and a text encoder or, for SDXL, a list of two."""

    def __init__(self, unet, text_encoder):
        self.unet, self.text_encoder = unet, text_encoder
        self.is_sdxl = isinstance(text_encoder, list)
        self.encoders = text_encoder if self.is_sdxl else [text_encoder]

    def predict(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
        ids = torch.randint(0, 48, (2, 8), generator=generator)
        outputs = [encoder(ids) for encoder in self.encoders]
        context = torch.cat([output.last_hidden_state for output in outputs], dim=-1)
        pooled = [outputs[1].text_embeds] if self.is_sdxl else []
        return self.unet(latents.requires_grad_(), torch.tensor([100, 800]), context, *pooled).sample, noise

    def modules(self):
        """kohya's name, by kohya's rule, of every attention projection."""
        prefixes = ["lora_te1_", "lora_te2_"] if self.is_sdxl else ["lora_te_"]
        parts = [("lora_unet_", self.unet), *zip(prefixes, self.encoders, strict=True)]
        found = {}
        for prefix, model in parts:
            for path, module in model.named_modules():
                if isinstance(module, nn.Linear) and (".attn" in path or "self_attn" in path):
                    path = path if prefix == "lora_unet_" or path.startswith("text_model.") else f"text_model.{path}"
                    found[prefix + path.replace(".", "_")] = module
        return found

    @torch.no_grad()
    def updates(self):
        """What the network adds to each projection's weight, as its outputs show it."""
        found = {}
        for name, layer in self.modules().items():
            inputs = torch.eye(layer.in_features)
            found[name] = (layer(inputs) - nn.functional.linear(inputs, layer.weight, layer.bias)).T.double()
        return found


@pytest.fixture
def new_base(new_unet, new_text_encoder):
    def make(family="sd1"):
        if family == "sd1":
            return Base(new_unet(), new_text_encoder())
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        first = new_text_encoder()
        second = {"hidden_size": 16, "projection_dim": 16}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            settings = CLIPTextConfig(**{**first.config.to_dict(), **second})
            second = CLIPTextModelWithProjection(settings).eval()
        unet = new_unet(
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            cross_attention_dim=24 + 16,
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        )
        return Base(SgmUNet(unet), [first, second])

    return make


@pytest.fixture(params=["sd1", "sdxl"])
def base(request, new_base):
    return new_base(request.param)


def parse(**changed):
    """The arguments of train_network.py that concern a network, at its defaults."""
    defaults = {
        "network_module": "lidb_peft.kohya", "network_dim": 1, "network_alpha": 1, "network_dropout": None,
        "network_args": NETWORK_ARGS, "network_weights": None, "dim_from_weights": False, "base_weights": None,
        "network_train_unet_only": False, "network_train_text_encoder_only": False, "gradient_checkpointing": False,
        "learning_rate": 0.02, "unet_lr": None, "text_encoder_lr": None, "max_grad_norm": 1.0,
        "scale_weight_norms": None, "save_model_as": "safetensors", "max_train_steps": 6, "mixed_precision": False,
    }  # fmt: skip
    return argparse.Namespace(**defaults | changed)


def prepare(base, args):
    """What train_network.py does up to the first step; return the network and its parameter groups."""
    module = importlib.import_module(args.network_module)
    for file in args.base_weights or []:
        merged, weights = module.create_network_from_weights(
            1.0, file, None, base.text_encoder, base.unet, for_inference=True
        )
        merged.merge_to(base.text_encoder, base.unet, weights, torch.float32, "cpu")
    net_kwargs = dict(argument.split("=", 1) for argument in args.network_args)
    if args.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1, args.network_weights, None, base.text_encoder, base.unet, **net_kwargs
        )
    else:
        net_kwargs["dropout"] = args.network_dropout
        network = module.create_network(
            1.0, args.network_dim, args.network_alpha, None, base.text_encoder, base.unet,
            neuron_dropout=args.network_dropout, **net_kwargs,
        )  # fmt: skip
    network.prepare_network(args)
    train_text_encoder, train_unet = not args.network_train_unet_only, not args.network_train_text_encoder_only
    network.apply_to(base.text_encoder, base.unet, train_text_encoder, train_unet)
    if args.network_weights is not None:
        assert "layers" in network.load_weights(args.network_weights)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    groups, labels = network.prepare_optimizer_params_with_multiple_te_lrs(
        args.text_encoder_lr, args.unet_lr, args.learning_rate
    )
    assert len(groups) == len(labels)
    for model in (base.unet, *base.encoders):
        model.requires_grad_(False)
    network.prepare_grad_etc(base.text_encoder, base.unet)
    return network, groups


def train(base, **changed):
    """What train_network.py does up to saving; return the network and the loss of each step."""
    args = parse(**changed)
    network, groups = prepare(base, args)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    network.on_epoch_start(base.text_encoder, base.unet)
    losses = []
    for _ in range(args.max_train_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision):
            predicted, target = base.predict()
        loss = nn.functional.mse_loss(predicted.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(network.get_trainable_params(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.scale_weight_norms:
            network.apply_max_norm_regularization(args.scale_weight_norms, torch.device("cpu"))
        losses.append(loss.item())
    return network, losses


def file_updates(path):
    """kohya's name -> alpha / rank * up @ down, read by the safetensors library alone."""
    tensors = {name: tensor.double() for name, tensor in safetensors.torch.load_file(path).items()}
    names = {name.partition(".")[0] for name in tensors}
    assert len(tensors) == 3 * len(names)
    return {
        name: tensors[f"{name}.alpha"]
        / len(tensors[f"{name}.lora_down.weight"])
        * tensors[f"{name}.lora_up.weight"]
        @ tensors[f"{name}.lora_down.weight"]
        for name in names
    }


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert (found[name] - update).norm() <= tolerance * update.norm() + 1e-6, name


def read_metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_fresh_network_changes_nothing(base):
    before = base.predict()[0]
    network, groups = prepare(base, parse())
    assert all(not update.any() for update in base.updates().values())
    # Sums of 64 numbers in another order on some processors, through a dozen layers.
    assert torch.allclose(base.predict()[0], before, rtol=0, atol=5e-6)
    assert len(network.rows) == len(base.modules()) == sum(len(group["params"]) for group in groups)


@pytest.mark.parametrize("rank", [1, 2])
def test_training_lowers_the_loss_and_the_file_holds_every_update(base, rank, tmp_path):
    weights = {name: layer.weight.clone() for name, layer in base.modules().items()}
    network, losses = train(base, network_dim=rank, network_alpha=1.5)
    assert losses[-1] < 0.99 * losses[0]
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in base.modules().items())
    updates = base.updates()
    assert min(update.norm() for update in updates.values()) > 1e-4
    for dtype, tolerance in ((None, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        path = tmp_path / f"{dtype}.safetensors"
        network.save_weights(str(path), dtype, METADATA)
        assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {dtype or torch.float32}
        assert_same(file_updates(path), updates, tolerance)


def test_the_multiplier_scales_the_update(new_base):
    base = new_base()
    network, _ = train(base)
    whole = base.updates()
    network.set_multiplier(-0.5)
    assert_same(base.updates(), {name: -0.5 * update for name, update in whole.items()}, 1e-4)


def test_sd_scripts_metadata_stays_and_the_hash_is_that_of_the_tensors(new_base, tmp_path):
    network, _ = train(new_base(), network_dim=2)
    path = tmp_path / "me.safetensors"
    network.save_weights(str(path), torch.float16, METADATA)
    found, blob = read_metadata(path), path.read_bytes()
    assert METADATA.items() - found.items() == {("ss_network_dim", "None")}
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "2.0")
    data = blob[8 + int.from_bytes(blob[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    network.save_weights(str(path), torch.float16, None)
    assert read_metadata(path)["sshs_model_hash"] == found["sshs_model_hash"]


@pytest.mark.parametrize("trained", ["unet", "text_encoder"])
def test_only_what_is_trained_is_in_the_file(base, trained, tmp_path):
    network, _ = train(base, **{f"network_train_{trained}_only": True})
    path = tmp_path / "part.safetensors"
    network.save_weights(str(path), None, None)
    expected = {name for name in base.modules() if name.startswith("lora_unet_") == (trained == "unet")}
    assert set(file_updates(path)) == expected
    assert all(update.norm() == 0 for name, update in base.updates().items() if name not in expected)


def test_theta_is_the_same_as_on_the_diffusers_models(base, tmp_path, recwarn):
    network, _ = train(base, network_args=[*NETWORK_ARGS, "save_theta=True"])
    network.save_weights(str(tmp_path / "me.safetensors"), None, METADATA)
    unet = base.unet.run[0] if base.is_sdxl else base.unet
    models = {"unet": unet, **dict(zip(("text_encoder", "text_encoder_2"), base.encoders, strict=False))}
    space = LiDBSpace(models, LiDBConfig(down_dim=12, up_dim=10))
    file = load_theta(tmp_path / "me-theta.safetensors", space)
    assert not recwarn.list
    assert torch.equal(file.theta, network.theta)
    assert (file.base_fingerprint, file.base_model_name) == (base_fingerprint(models), "tiny.safetensors")
    path = tmp_path / "again.safetensors"
    save_kohya(path, space.factors(file.theta), KohyaMetadata("sdxl" if base.is_sdxl else "sd1"), torch.float32)
    assert_same(file_updates(path), base.updates(), 1e-5)


def test_without_asking_no_theta_is_written(new_base, tmp_path):
    network, _ = prepare(new_base(), parse())
    network.save_weights(str(tmp_path / "me.safetensors"), None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["me.safetensors"]


@pytest.fixture
def saved(new_base, tmp_path):
    """A trained base, and its LoRA and theta files."""
    base = new_base()
    network, _ = train(base, network_args=[*NETWORK_ARGS, "save_theta=True"])
    lora = tmp_path / "me.safetensors"
    network.save_weights(str(lora), torch.float32, METADATA)
    return base, {"lora": str(lora), "theta": str(tmp_path / "me-theta.safetensors")}


@pytest.mark.parametrize("kind", ["lora", "theta"])
@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_training_goes_on_from_a_file(saved, new_base, kind, dim_from_weights):
    trained, files = saved
    changed = {"network_args": []} if dim_from_weights else {}
    base = new_base()
    network, _ = prepare(base, parse(network_weights=files[kind], dim_from_weights=dim_from_weights, **changed))
    assert_same(base.updates(), trained.updates(), 1e-5)
    if kind == "theta":
        assert torch.equal(network.theta, load_theta(files["theta"]).theta)
    _, losses = train(new_base(), network_weights=files[kind], dim_from_weights=dim_from_weights, **changed)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["lora", "theta"])
def test_base_weights_are_merged(saved, new_base, kind):
    trained, files = saved
    base = new_base()
    before = {name: layer.weight.double() for name, layer in base.modules().items()}
    prepare(base, parse(base_weights=[files[kind]]))
    merged = {name: layer.weight.double() - before[name] for name, layer in base.modules().items()}
    assert_same(merged, trained.updates(), 1e-3)  # the weights' own rounding
    assert torch.allclose(base.predict()[0], trained.predict()[0], atol=1e-4)


def test_gen_img_applies_a_file_by_its_state_dict(saved, new_base):
    trained, files = saved
    base = new_base()
    module = importlib.import_module("lidb_peft.kohya")
    network, weights = module.create_network_from_weights(
        0.5, files["lora"], None, [base.text_encoder], base.unet, for_inference=True
    )
    network.apply_to([base.text_encoder], base.unet)
    info = network.load_state_dict(weights, False)
    assert network.is_mergeable()
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert_same(base.updates(), {name: 0.5 * update for name, update in trained.updates().items()}, 1e-5)


def test_a_lora_that_theta_cannot_hold_is_refused(saved, new_base, tmp_path):
    _, files = saved
    with pytest.raises(ValueError, match=r"was made with seed 0 \(here 1\)"):
        prepare(new_base(), parse(network_weights=files["lora"], network_args=[*NETWORK_ARGS, "seed=1"]))
    factors, _ = load_kohya(files["lora"])
    foreign = tmp_path / "foreign.safetensors"
    save_kohya(foreign, factors, KohyaMetadata(), torch.float32)  # carries no record
    prepare(new_base(), parse(network_weights=str(foreign)))
    with pytest.raises(
        ValueError, match=r"is not a LoRA of these bases: theta loses ([4-9][0-9]|100)% of its update of "
    ):
        prepare(new_base(), parse(network_weights=str(foreign), network_args=[*NETWORK_ARGS, "seed=1"]))
    with pytest.raises(ValueError, match="does not say which bases its weights lie in; name a theta file"):
        prepare(new_base(), parse(base_weights=[str(foreign)]))
    pickled = tmp_path / "me.ckpt"
    pickled.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is a pickled file"):
        prepare(new_base(), parse(network_weights=str(pickled)))


def test_half_precision_loras_give_their_updates_back(new_base, tmp_path):
    base = new_base()
    network, _ = train(base)
    for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        network.save_weights(str(tmp_path / "me.safetensors"), dtype, None)
        again = new_base()
        prepare(again, parse(network_weights=str(tmp_path / "me.safetensors")))
        assert_same(again.updates(), base.updates(), tolerance)


def test_a_file_that_changes_what_is_not_trained_is_refused(saved, new_base, tmp_path):
    _, files = saved
    with pytest.raises(
        ValueError, match=r"changes 8 layers that are not trained now, such as text_encoder\.text_model"
    ):
        prepare(new_base(), parse(network_weights=files["theta"], network_train_unet_only=True))
    network, _ = train(new_base(), network_train_unet_only=True)
    network.save_weights(str(tmp_path / "unet.safetensors"), None, None)
    for only in (True, False):
        prepare(new_base(), parse(network_weights=str(tmp_path / "unet.safetensors"), network_train_unet_only=only))


RATES = [  # text_encoder_lr, unet_lr -> rates of unet, text_encoder, text_encoder_2 (0.02 is learning_rate)
    (None, None, (0.02, 0.02, 0.02)),
    ([], 0.5, (0.5, 0.02, 0.02)),
    (0.1, None, (0.02, 0.1, 0.1)),
    ([0.1], 0.5, (0.5, 0.1, 0.1)),
    ([0.1, 0.2], 0.5, (0.5, 0.1, 0.2)),
    ([0.0, 0.2], 0.5, (0.5, None, 0.2)),
    ([0.1], 0.0, (None, 0.1, 0.1)),
]


@pytest.mark.parametrize(("text_encoder_lr", "unet_lr", "expected"), RATES)
def test_learning_rates_of_the_parts(new_base, text_encoder_lr, unet_lr, expected):
    network, groups = prepare(new_base("sdxl"), parse(text_encoder_lr=text_encoder_lr, unet_lr=unet_lr))
    rates = {id(row): group["lr"] for group in groups for row in group["params"]}
    parts = ("unet", "text_encoder", "text_encoder_2")
    for name, row in zip(network.space.layer_names, network.rows, strict=True):
        rate = expected[parts.index(name.partition(".")[0])]
        assert rates.get(id(row)) == rate
        assert row.requires_grad == (rate is not None)
    assert {id(row) for row in network.get_trainable_params()} == set(rates)


def test_two_rates_for_one_text_encoder_are_refused(new_base):
    with pytest.raises(ValueError, match="text_encoder_lr has 2 rates for 1 text encoders"):
        prepare(new_base(), parse(text_encoder_lr=[0.1, 0.2]))


def assert_block_rates(base, expected, **network_args):
    """``expected``: what kohya's names begin with -> the learning rate there, at 1 without block weights."""
    args = [*NETWORK_ARGS, *(f"{name}={value}" for name, value in network_args.items())]
    network, groups = prepare(base, parse(network_args=args, unet_lr=1.0, network_train_unet_only=True))
    rates = {id(row): group["lr"] for group in groups for row in group["params"]}
    names = {layer: name for name, layer in base.modules().items() if name.startswith("lora_unet_")}
    found = {}
    for layer, row in zip(network.space.layers, network.rows, strict=True):
        if layer in names:
            block = next(start for start in expected if names[layer].startswith(start))
            assert found.setdefault(block, rates.get(id(row))) == rates.get(id(row))
    assert found == pytest.approx(expected)


def test_block_weights_are_those_of_kohyas_numbers(new_base):
    """The first attention of SD1 follows conv_in, and going up three blocks have none."""
    numbers = [i / 10 for i in range(12)]
    text = ",".join(map(str, numbers))
    expected = {
        "lora_unet_down_blocks_0_attentions_0_": numbers[1],
        "lora_unet_mid_block_": 7.0,
        "lora_unet_up_blocks_1_attentions_0_": numbers[3],
        "lora_unet_up_blocks_1_attentions_1_": numbers[4],
    }
    assert_block_rates(new_base(), expected, down_lr_weight=text, mid_lr_weight="7", up_lr_weight=text)


def test_block_weights_of_sdxl_are_those_of_its_own_numbers(new_base):
    numbers = [0.1 * (1 + i) for i in range(9)]
    text = ",".join(map(str, numbers))
    expected = {
        **{f"lora_unet_input_blocks_{i}_": numbers[i] for i in (4, 5, 7, 8)},
        "lora_unet_middle_block_1_": 2.0,
        **{f"lora_unet_output_blocks_{i}_": numbers[i] for i in range(6)},
    }
    assert_block_rates(new_base("sdxl"), expected, down_lr_weight=text, mid_lr_weight="1,2,3", up_lr_weight=text)


PRESETS = {  # the weights of blocks 3 and 4 of 12
    "sine": (math.sin(math.pi / 2 * 3 / 11), math.sin(math.pi / 2 * 4 / 11)),
    "cosine+.25": (math.cos(math.pi / 2 * 3 / 11) + 0.25, math.cos(math.pi / 2 * 4 / 11) + 0.25),
    "linear": (3 / 11, 4 / 11),
    "reverse_linear": (8 / 11, 7 / 11),
    "zeros+2": (2.0, 2.0),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_block_weights_by_name(new_base, preset):
    third, fourth = PRESETS[preset]
    expected = {
        "lora_unet_up_blocks_1_attentions_0_": third,
        "lora_unet_up_blocks_1_attentions_1_": fourth,
        "lora_unet_": 1.0,
    }
    assert_block_rates(new_base(), expected, up_lr_weight=preset)


def test_block_weights_at_or_below_the_threshold_freeze_a_block(new_base):
    expected = {
        "lora_unet_up_blocks_1_attentions_0_": 1.5 - 3 / 11,
        "lora_unet_up_blocks_1_attentions_1_": None,  # 1.5 - 4 / 11
        "lora_unet_": 1.0,  # not given, so not compared
    }
    assert_block_rates(new_base(), expected, up_lr_weight="reverse_linear+0.5", block_lr_zero_threshold="1.2")


def test_checkpointed_blocks_give_the_same_gradients(base):
    """sd-scripts checkpoints with torch's reentrant function, inside its blocks."""
    network, _ = prepare(base, parse())
    with torch.no_grad():
        for index, row in enumerate(network.rows):
            row.add_(0.3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(index)))

    def gradients():
        network.zero_grad()
        predicted, target = base.predict()
        nn.functional.mse_loss(predicted, target).backward()
        return [row.grad.clone() for row in network.rows if row.grad is not None]

    expected = gradients()
    for module in base.unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":

            def checkpointed(x, encoder_hidden_states, forward=module.forward, **options):
                def run(x, context):
                    return forward(x, encoder_hidden_states=context, **options)

                return torch.utils.checkpoint.checkpoint(run, x, encoder_hidden_states, use_reentrant=True)

            module.forward = checkpointed
    for found, gradient in zip(gradients(), expected, strict=True):
        assert torch.allclose(found, gradient, atol=1e-6)


def test_mixed_precision_trains_float32_weights_in_unrounded_bases(new_base, tmp_path):
    base = new_base()
    network, losses = train(base, mixed_precision=True)
    assert losses[-1] < 0.99 * losses[0]
    assert {row.dtype for row in network.rows} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        network.save_weights(str(tmp_path / "me.safetensors"), None, None)
        lora_A, lora_B = network._factors(3)
    expected = network.space.factors(network.theta)[network.space.layer_names[3]]
    assert torch.allclose(lora_B @ lora_A, expected[1] @ expected[0], atol=1e-7)


def test_dropout_drops_the_input_of_the_updates_while_training(new_base):
    base = new_base()
    network, _ = train(base, network_dropout=0.5)
    name, layer = next(iter(base.modules().items()))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(1))
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = layer(x)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, 0.5)
    network.eval()
    update = base.updates()[name].float()
    assert torch.allclose(found - plain, dropped @ update.T, atol=1e-6)
    assert torch.allclose(layer(x) - plain, x @ update.T, atol=1e-6)
    assert (x @ update.T).abs().max() > 1e-3


def test_weight_norms_are_limited(new_base):
    base = new_base()
    network, _ = train(base)
    before = base.updates()
    limit = sorted(update.norm().item() for update in before.values())[len(before) // 2]
    keys_scaled, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    expected = {name: update * min(1.0, limit / update.norm().item()) for name, update in before.items()}
    assert_same(base.updates(), expected, 1e-4)
    norms = [update.norm().item() for update in expected.values()]
    assert (mean, largest) == (pytest.approx(sum(norms) / len(norms), rel=1e-4), pytest.approx(limit, rel=1e-4))
    assert abs(keys_scaled - (len(before) - 1) // 2) <= 1


WRONG = [
    ({"network_args": ["conv_dim=4"]}, "network_args has conv_dim; here it takes down_dim, up_dim, seed, save_theta"),
    ({"network_args": ["down_dim=many"]}, "network_args has down_dim=many; give a whole number"),
    ({"network_args": ["save_theta=1"]}, "network_args has save_theta=1; give True or False"),
    (
        {"network_args": ["down_lr_weight=1,2"]},
        "down_lr_weight is '1,2'; it takes a list of 12, with commas between, or one",
    ),
    ({"network_args": ["mid_lr_weight=sine"]}, "mid_lr_weight is 'sine'; it takes a list of 1, with commas between$"),
    ({"network_args": ["up_lr_weight=sine+much"]}, "up_lr_weight is 'sine\\+much'; it takes a list of 12"),
    ({"network_dim": 0}, "r is 0; choose an integer of 1 or more"),
    ({"network_dropout": 1.0}, "lidb_dropout is 1.0; choose a number from 0 to below 1"),
    ({"save_model_as": "ckpt"}, "save_model_as is ckpt; LoRA files are written as safetensors only"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_cannot_be_done_is_refused_before_training(new_base, changed, message):
    with pytest.raises(ValueError, match=message):
        prepare(new_base(), parse(**changed))


def test_settings_that_a_file_holds_are_not_asked_for_again(saved, new_base):
    _, files = saved
    with pytest.raises(ValueError, match="network_args has down_dim, up_dim; here it takes save_theta"):
        prepare(new_base(), parse(network_weights=files["theta"], dim_from_weights=True))


def test_alpha_is_over_the_rank_as_in_kohyas_lora(new_base):
    for alpha, rank, scale in ((1, 1, 1.0), (1, 4, 0.25), (8, 4, 2.0), (0, 4, 1.0), (None, 4, 0.25)):
        network, _ = prepare(new_base(), parse(network_dim=rank, network_alpha=alpha))
        assert network.space.config.scale == scale
