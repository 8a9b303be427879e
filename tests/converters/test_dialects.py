"""A LoRA drawn from the grammar of all known dialects: what is written, kept and refused is what came in.

Names, shapes, dtypes, alphas and prefixes are drawn; the updates are computed in NumPy, and what we write is read by
other programs' readers (``readers.py``).
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from converters import prepare_conversion, read_lora

CROSS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
# Our path, the first authors', shape of the weight in diffusers; the first tells the family and is always there.
_CROSS_1 = "attentions.0.transformer_blocks.0.attn2.to_k"
_SD = (
    (f"down_blocks.0.{_CROSS_1}", "input_blocks.1.1.transformer_blocks.0.attn2.to_k", ()),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
     "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0", (4, 6)),
    ("up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
     "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj", (8, 4)),
    ("down_blocks.1.attentions.1.proj_in", "input_blocks.5.1.proj_in", (4, 6)),
    ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out", (6, 4)),
    ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2", (4, 5, 3, 3)),
    ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection", (4, 6, 1, 1)),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv", (4, 5, 3, 3)),
)  # fmt: skip
_SDXL = (
    (f"down_blocks.1.{_CROSS_1}", "input_blocks.4.1.transformer_blocks.0.attn2.to_k", ()),
    ("down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0",
     "input_blocks.8.1.transformer_blocks.9.attn1.to_out.0", (4, 6)),
    ("mid_block.attentions.0.transformer_blocks.3.ff.net.2", "middle_block.1.transformer_blocks.3.ff.net.2", (4, 8)),
    ("up_blocks.0.attentions.2.proj_in", "output_blocks.2.1.proj_in", (4, 6)),
    ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2", (4, 5, 3, 3)),
    ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection", (4, 6, 1, 1)),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", (4, 5, 3, 3)),
)  # fmt: skip
_CLIP = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.11.mlp.fc2")
_CLIP_G = ("text_model.encoder.layers.31.mlp.fc1", "text_projection")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
KINDS = ("lora", "lora", "rank 0", "nan", "tucker", "lokr", "diff")
FACTORS = {  # what a tool calls the two
    "kohya": ("lora_down.weight", "lora_up.weight"), "peft": ("lora_A.weight", "lora_B.weight"),
    "live": ("lora_A.default.weight", "lora_B.default.weight"), "diffusers": ("lora.down.weight", "lora.up.weight"),
    "bare": ("lora_A", "lora_B"),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A layer of a model: ``ours`` is component and path; ``original`` the first authors' path."""

    ours: str
    original: str
    shape: tuple

    @property
    def path(self):
        return self.ours.partition(".")[2]


def layers_of(family):
    unet = _SDXL if family == "sdxl" else _SD
    found = []
    for path, original, shape in unet:
        shape = shape or (4, CROSS[family])
        is_projection = path.endswith(("proj_in", "proj_out"))
        found.append(Layer(f"unet.{path}", original, (*shape, 1, 1) if is_projection and family == "sd1" else shape))
    encoders = {"text_encoder": _CLIP} | ({"text_encoder_2": _CLIP_G} if family == "sdxl" else {})
    for component, paths in encoders.items():
        found += [Layer(f"{component}.{path}", path, (6, 6)) for path in paths]
    return found


def kohya_name(layer, family):
    path = layer.original if family == "sdxl" else layer.path
    component = layer.ours.partition(".")[0]
    te = {
        "text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_",
        "text_encoder_2": "lora_te2_",
        "unet": "lora_unet_",
    }
    return te[component] + path.replace(".", "_")


def comfy_name(layer, family):
    component = layer.ours.partition(".")[0]
    clip = {"text_encoder": "clip_h" if family == "sd2" else "clip_l", "text_encoder_2": "clip_g"}
    start = "diffusion_model" if component == "unet" else f"text_encoders.{clip[component]}.transformer"
    return f"{start}.{layer.original}"


def component_and_path(layer, between):
    component, _, path = layer.ours.partition(".")
    return f"{component}.{between}{path}"


def flat_diffusers(layer, family):
    """Names that some tools give SDXL too; LyCORIS's own prefix is for the UNet alone."""
    component = layer.ours.partition(".")[0]
    return f"lora_unet_{layer.path.replace('.', '_')}" if component == "unet" else kohya_name(layer, family)


DIALECTS = {  # name of a module, and the spellings of factors that go with it
    "kohya": (kohya_name, ("kohya",)),
    "flat diffusers": (flat_diffusers, ("kohya",)),
    "lycoris": (lambda layer, family: flat_diffusers(layer, family).replace("lora_unet_", "lycoris_"), ("kohya",)),
    "diffusers": (lambda layer, family: layer.ours, ("peft", "diffusers", "live", "bare", "kohya")),
    "wrapped": (lambda layer, family: f"module.{layer.ours}", ("peft", "kohya")),
    "peft in a component": (lambda layer, family: component_and_path(layer, "base_model.model."), ("peft", "live")),
    "comfyui": (comfy_name, ("peft", "kohya")),
    "onetrainer": (lambda layer, family: f"{layer.ours.partition('.')[0]}.{layer.original}", ("kohya", "peft")),
}


def numbers(draw, shape, dtype):
    """Small multiples of an eighth, which every dtype holds."""
    seed = draw(st.integers(0, 2**16))
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).div(8).to(dtype)


def dims(draw, tensor, is_kernel):
    """1x1 convolutions and linear layers are written either way, and mixed."""
    return tensor if is_kernel else tensor.flatten(1)[(...,) + (None, None) * draw(st.booleans())]


@st.composite
def adapters(draw):
    """``(family, tensors, expected updates, name of what is left out -> why, embeddings)``."""
    family, dialect = draw(st.sampled_from(list(CROSS))), draw(st.sampled_from(list(DIALECTS)))
    name_of, spellings = DIALECTS[dialect]
    down_end, up_end = FACTORS[draw(st.sampled_from(spellings))]
    dtype, has_alpha = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    first, *others = layers_of(family)
    chosen = [first, *draw(st.lists(st.sampled_from(others), unique=True, max_size=4))]
    tensors, updates, dropped = {}, {}, {}
    for layer in chosen:
        name, shape = name_of(layer, family), layer.shape
        is_kernel, rank = shape[2:] == (3, 3), draw(st.integers(1, 3))
        kind = (
            "lora"
            if layer is first
            else draw(st.sampled_from(["lora", "lora", "rank 0", "nan", "tucker", "lokr", "diff"]))
        )
        alpha = draw(st.sampled_from([1.0, 2.0, 0.5, 3.0])) if has_alpha else None
        if kind == "rank 0":
            tensors |= {f"{name}.{down_end}": torch.zeros(0, shape[1]), f"{name}.{up_end}": torch.zeros(shape[0], 0)}
            dropped[layer.ours] = kind
            continue
        if kind == "lokr":
            w1, w2 = numbers(draw, (2, 1), dtype), numbers(draw, (shape[0] // 2, *shape[1:]), dtype)
            tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}
            updates[layer.ours] = np.kron(w1.double().numpy(), w2.double().flatten(1).numpy())
            continue
        if kind == "diff":
            tensors[f"{name}.diff"] = numbers(draw, shape, dtype)
            updates[layer.ours] = tensors[f"{name}.diff"].double().flatten(1).numpy()
            continue
        down, up = (
            numbers(draw, (rank, *shape[1:]), dtype),
            numbers(draw, (shape[0], rank, *(1 for _ in shape[2:])), dtype),
        )
        if kind == "nan":
            up = up.clone()
            up.view(-1)[0] = torch.nan
            dropped[layer.ours] = kind
        if kind == "tucker" and is_kernel and "lora_down" in down_end:
            core = numbers(draw, (rank, rank, 3, 3), dtype)
            down = down[:, :, :1, :1].clone()
            tensors[f"{name}.lora_mid.weight"] = core
            dense = np.einsum(
                "om,mnhw,ni->oihw", *(t.double().numpy() for t in (up[:, :, 0, 0], core, down[:, :, 0, 0]))
            )
        else:
            dense = up.double().flatten(1).numpy() @ down.double().flatten(1).numpy()
            down, up = (dims(draw, tensor, is_kernel) for tensor in (down, up))
        tensors |= {f"{name}.{down_end}": down, f"{name}.{up_end}": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        if kind != "nan":
            updates[layer.ours] = (1.0 if alpha is None else alpha / rank) * flat(dense)
    embeddings = {"bundle_emb.me.string_to_param.*": torch.randn(2, 4)} if draw(st.booleans()) else {}
    return family, tensors, updates, dropped, embeddings


def flat(array):
    return array.reshape(len(array), -1)


def ours(update):
    if hasattr(update, "delta"):
        return flat(update.delta().numpy())
    return update.scale * flat(update.lora_B.double().flatten(1).numpy() @ update.lora_A.double().flatten(1).numpy())


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(adapter=adapters())
def test_what_is_read_kept_and_left_out_is_what_came_in(tmp_path_factory, readers, adapter):
    family, tensors, updates, dropped, embeddings = adapter
    path = tmp_path_factory.getbasetemp() / "in.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in (tensors | embeddings).items()}, path)
    lora = read_lora(path, full_updates=True, drop_nan=True)
    found = lora.layers | dict(lora.full_updates)
    assert found.keys() == updates.keys()
    assert lora.family == family
    for kind, said in (("rank 0", " of rank 0, which change nothing"), ("nan", " with NaN or infinity")):
        names = {name for name, found in dropped.items() if found == kind}
        (note,) = [note for note in lora.notes if said in note] if names else [""]
        assert note.startswith(f"{len(names)} layer" if names else "")
        assert sum(name in note for name in names) == min(len(names), 2)  # and how many more
    assert lora.embeddings.keys() == embeddings.keys()
    for name, update in updates.items():
        np.testing.assert_allclose(ours(found[name]), update, rtol=1e-6, atol=1e-6, err_msg=name)

    # What we make of it, as other programs read it: full updates keep all of their rank.
    out = tmp_path_factory.getbasetemp() / "out.safetensors"
    rank = {"rank": 12} if lora.full_updates else {}
    prepare_conversion(path, out, "kohya", torch.float32, drop_nan=True, overwrite=True, **rank).write()
    arrays, metadata = readers.read_file(out)
    assert {name for name in arrays if name.startswith("bundle_emb.")} == embeddings.keys()
    layers = layers_of(family)
    names = {kohya_name(layer, family): layer for layer in layers}
    kohya_shapes = {
        name: (*layer.shape, 1, 1) if family == "sd2" and layer.path.endswith(("proj_in", "proj_out")) else layer.shape
        for name, layer in names.items()
    }
    by_kohya = {names[name].ours: update for name, update in readers.kohya(arrays, kohya_shapes).items()}
    by_a1111 = {names[name].ours: update for name, update in readers.a1111(arrays, kohya_shapes).items()}
    by_comfyui = comfyui(readers, arrays, layers, family)
    for read in (by_kohya, by_a1111, by_comfyui):
        assert read.keys() == updates.keys()
        for name, update in updates.items():
            np.testing.assert_allclose(read[name], update, rtol=1e-4, atol=1e-5, err_msg=name)
    assert metadata["ss_v2"] == str(family == "sd2")
    assert metadata.get("ss_base_model_version", "").startswith({"sd1": "sd_v1", "sd2": "", "sdxl": "sdxl_"}[family])
    assert "modelspec.prediction_type" not in metadata


def comfyui(readers, arrays, layers, family):
    """What ComfyUI finds, by our layers' names."""
    unet = {layer.path: layer.original for layer in layers if layer.ours.startswith("unet.")}
    clip = {"text_encoder": ("clip_h" if family == "sd2" else "clip_l", ("lora_te_", "lora_te1_")),
            "text_encoder_2": ("clip_g", ("lora_te2_",))}  # fmt: skip
    encoders, by_weight = {}, {}
    for layer in layers:
        component, _, path = layer.ours.partition(".")
        if component == "unet":
            by_weight[f"diffusion_model.{layer.original}.weight"] = layer
        else:
            name, prefixes = clip[component]
            encoders.setdefault(name, (prefixes, component, []))[2].append(path)
            by_weight[f"{name}.transformer.{path}.weight"] = layer
    key_map = readers.comfyui_key_map(unet, encoders)
    shapes = {weight: layer.shape for weight, layer in by_weight.items()}
    return {by_weight[weight].ours: update for weight, update in readers.comfyui(arrays, key_map, shapes).items()}


# ---- diffusers' own loader ----


class Skeleton(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A UNet of the drawn layers alone, which diffusers' loader takes for one."""

    @register_to_config
    def __init__(self, layers_per_block=2):
        super().__init__()


def skeleton_of(layers):
    model = Skeleton()
    for layer in layers:
        out, width, *kernel = layer.shape
        *parents, last = layer.path.split(".")
        parent = model
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        parent.add_module(last, torch.nn.Conv2d(width, out, kernel) if kernel else torch.nn.Linear(width, out))
    return model


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(adapter=adapters(), to=st.sampled_from(["kohya", "diffusers"]))
def test_diffusers_loads_what_we_write_with_the_updates_that_came_in(tmp_path_factory, adapter, to):
    family, tensors, updates, *_ = adapter
    path, out = (tmp_path_factory.getbasetemp() / name for name in ("in.safetensors", "for-diffusers.safetensors"))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    rank = {"rank": 12} if read_lora(path, full_updates=True, drop_nan=True).full_updates else {}
    prepare_conversion(path, out, to, torch.float32, drop_nan=True, overwrite=True, **rank).write()
    layers = [layer for layer in layers_of(family) if layer.ours.startswith("unet.") and layer.ours in updates]
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    config = SimpleNamespace(layers_per_block=2)
    state, alphas, *_ = pipeline.lora_state_dict(str(out), unet_config=config, return_lora_metadata=True)
    if family == "sd2" and to == "kohya":  # its convolutions are sd-scripts', as our notes say
        odd = ("proj_in", "proj_out")
        layers = [layer for layer in layers if not layer.path.endswith(odd)]
        state = {name: tensor for name, tensor in state.items() if not any(f".{word}." in name for word in odd)}
    if not any(name.startswith("unet.") for name in state):
        assert not layers
        return
    model = skeleton_of(layers)
    model.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="a")
    for layer in layers:
        found = model.get_submodule(layer.path).get_delta_weight("a").detach()
        np.testing.assert_allclose(flat(found.numpy()), updates[layer.ours], rtol=1e-4, atol=1e-5, err_msg=layer.ours)


# ---- FLUX.1, whose first authors have several of diffusers' layers in one ----

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
FLUX = {  # the first authors' path -> diffusers' paths and their numbers of rows; the first tells the family
    "single_blocks.37.linear1": (
        [f"{_SINGLE.format(37)}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        (4, 4, 4, 16),
    ),
    "double_blocks.0.img_attn.qkv": ([f"{_DOUBLE.format(0)}.attn.to_{x}" for x in "qkv"], (4, 4, 4)),
    "double_blocks.18.txt_attn.qkv": ([f"{_DOUBLE.format(18)}.attn.add_{x}_proj" for x in "qkv"], (4, 4, 4)),
    "double_blocks.18.txt_attn.proj": ([f"{_DOUBLE.format(18)}.attn.to_add_out"], (4,)),
    "double_blocks.3.img_mlp.0": ([f"{_DOUBLE.format(3)}.ff.net.0.proj"], (8,)),
    "double_blocks.3.txt_mod.lin": ([f"{_DOUBLE.format(3)}.norm1_context.linear"], (8,)),
    "single_blocks.0.linear2": ([f"{_SINGLE.format(0)}.proj_out"], (4,)),
}
FLUX_DIALECTS = {  # how a module is called, whether by the first authors' paths, and its factors
    "kohya": (lambda path: f"lora_unet_{path.replace('.', '_')}", True, ("kohya",)),
    "comfyui": (lambda path: f"diffusion_model.{path}", True, ("peft", "kohya")),
    "checkpoint's": (lambda path: f"model.diffusion_model.{path}", True, ("peft",)),
    "diffusers": (lambda path: f"transformer.{path}", False, ("peft", "live", "kohya")),
    "onetrainer": (lambda path: f"lora_transformer_{path.replace('.', '_')}", False, ("kohya",)),
}


@st.composite
def flux_adapters(draw):
    """Tensors of a file, and the update of each of diffusers' paths that it holds."""
    name_of, are_originals, spellings = FLUX_DIALECTS[draw(st.sampled_from(sorted(FLUX_DIALECTS)))]
    down_end, up_end = FACTORS[draw(st.sampled_from(spellings))]
    dtype, tensors, updates = draw(st.sampled_from(DTYPES[:3])), {}, {}
    for index, (original, (paths, rows)) in enumerate(FLUX.items()):
        if index and not draw(st.booleans()):
            continue
        modules = [(original, paths, rows)] if are_originals else [
            (path, [path], (own,)) for path, own in zip(paths, rows, strict=True) if not index or draw(st.booleans())
        ]  # fmt: skip
        for name, own_paths, own_rows in modules:
            rank, module = draw(st.integers(1, 4)), name_of(name)
            down, up = numbers(draw, (rank, 6), dtype), numbers(draw, (sum(own_rows), rank), dtype)
            up[up == 0] = 0.5  # rows of zeros are no update of a layer
            tensors |= {f"{module}.{down_end}": down, f"{module}.{up_end}": up}
            alpha = draw(st.sampled_from([None, float(rank), 1.0, 0.5])) if "lora_down" in down_end else None
            if alpha is not None:
                tensors[f"{module}.alpha"] = torch.tensor(alpha)
            update = (1.0 if alpha is None else alpha / rank) * up.double().numpy() @ down.double().numpy()
            parts = np.split(update, np.cumsum(own_rows)[:-1])
            updates |= dict(zip(own_paths, parts, strict=True))
    return tensors, updates


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(adapter=flux_adapters())
def test_flux_is_read_in_any_dialect_and_written_for_its_readers(tmp_path_factory, readers, adapter):
    tensors, updates = adapter
    path, out = (tmp_path_factory.getbasetemp() / name for name in ("flux.safetensors", "flux-out.safetensors"))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    lora = read_lora(path)
    assert lora.family == "flux1"
    assert lora.layers.keys() == {f"transformer.{name}" for name in updates}
    for name, update in updates.items():
        np.testing.assert_allclose(ours(lora.layers[f"transformer.{name}"]), update, rtol=1e-6, atol=1e-6, err_msg=name)
    prepare_conversion(path, out, "kohya", torch.float32, overwrite=True).write()
    arrays, _ = readers.read_file(out)
    whole = {
        f"lora_unet_{original.replace('.', '_')}": np.concatenate(
            [updates.get(name, np.zeros((own, 6))) for name, own in zip(paths, rows, strict=True)]
        )
        for original, (paths, rows) in FLUX.items()
        if updates.keys() & set(paths)
    }
    found = readers.kohya(arrays, {name: update.shape for name, update in whole.items()})
    assert found.keys() == whole.keys()
    assert len(arrays) == 3 * len(whole)
    for name, update in whole.items():
        np.testing.assert_allclose(found[name], update, rtol=1e-4, atol=1e-5, err_msg=name)
    prepare_conversion(path, out, "diffusers", torch.float32, overwrite=True).write()
    arrays, _ = readers.read_file(out)
    for name, update in updates.items():
        product = arrays[f"transformer.{name}.lora_B.weight"] @ arrays[f"transformer.{name}.lora_A.weight"]
        np.testing.assert_allclose(product, update, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_name_that_is_not_understood_is_refused_and_named(tmp_path, dialect):
    name_of, spellings = DIALECTS[dialect]
    name = name_of(layers_of("sd1")[0], "sd1")
    down, up = FACTORS[spellings[0]]
    good = {f"{name}.{down}": torch.ones(1, 768), f"{name}.{up}": torch.ones(4, 1)}
    for odd in (f"{name.replace('attn2', 'attn3')}.{down}", f"{name}.strange", "zeta"):
        save_file(good | {odd: torch.ones(1, 768)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="holds 1 keys that are no LoRA") as caught:
            read_lora(tmp_path / "a.safetensors")
        assert odd in str(caught.value)
