"""Stable Diffusion 1, 2 and XL from one file in their first authors' names, without the hub.

What such a file lacks is made here: configs from the shapes of its tensors and from what the families say beyond them,
CLIP's tokenizers from those that ship. Text encoders are found by what they are made of, so it does not matter how a
program calls them: ``cond_stage_model.transformer.text_model.``, ``conditioner.embedders.1.model.``, ``te1.``, in
transformers' names or OpenCLIP's. Names of the UNet are the families' (`Component.originals`); those of the VAE are of
CompVis' ``ldm/modules/diffusionmodules/model.py``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hypernet.base_models.checkpoints import denoiser_prefix
from hypernet.base_models.clip_tokenizer import END, MAX_TOKENS, START, VOCABULARY_SIZE, clip_tokenizer, vocabulary
from hypernet.base_models.prediction import HAS_ZERO_SNR, Prediction, stated_prediction
from lidb_peft.families import Component, Family, clip
from lidb_peft.safe_read import examples, iter_tensors, read_header

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

Shapes = Mapping[str, tuple[int, ...]]
Rename = Callable[[str], str]

VAE = "vae"
_HEAD_WIDTH = 64  # of all attentions, but for those of a family that says how many heads it has
_MAX_NAME_CHARS = 240  # of names that are looked into
_NUM_SIZES = 6  # that SDXL's UNet is told of a picture
_LEVEL = "text_model."
_STACKED = re.compile(r"(encoder\.layers\.\d+\.)attn\.in_proj_(weight|bias)")
_VAE_ATTENTION = {
    "norm": "group_norm", "q": "to_q", "query": "to_q", "k": "to_k", "key": "to_k", "v": "to_v", "value": "to_v",
    "proj_out": "to_out.0", "proj_attn": "to_out.0",
}  # fmt: skip
_ATTENDED, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


@dataclass(frozen=True)
class Part:
    """The tensors of one component in a file.

    Args:
        rename: a tensor's name in the file -> ours, where it is one tensor there and here.
        shapes: by the names in the file.
        is_openclip: a text encoder in OpenCLIP's names.
    """

    shapes: Shapes
    rename: Rename
    is_openclip: bool = False
    renamed: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "renamed", {self.rename(name): shape for name, shape in self.shapes.items()})

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """The shape of a tensor by our name.

        Raises:
            ValueError: it is not there, or has another number of dimensions.
        """
        if name not in self.renamed:
            raise ValueError(f"it lacks {name}; get the file again")
        if len(self.renamed[name]) != num_dims:
            raise ValueError(f"its {name} has shape {self.renamed[name]} where {num_dims} dimensions are expected; get "
                             f"the file again")  # fmt: skip
        return self.renamed[name]

    def count(self, path: str) -> int:
        """How many numbers from 0 on come after ``path`` in the names that are there."""
        found = (re.match(r"(\d{1,2})\.", name[len(path) :]) for name in self.renamed if name.startswith(path))
        numbers = {int(number[1]) for number in found if number}
        return next(index for index in range(len(numbers) + 1) if index not in numbers)


def find_parts(path: Path, family: Family) -> dict[str, Part]:
    """Return what a single file holds of a family's components and their VAE, by name; the denoiser is there."""
    tensors = read_header(path).tensors
    shapes = {name: info.shape for name, info in tensors.items() if len(name) <= _MAX_NAME_CHARS}
    denoiser = family.denoiser
    prefix = denoiser_prefix(family, shapes)
    assert prefix is not None, f"{path} is of another family than {family.name}"
    words = {original.partition(".")[0] for _, original in denoiser.originals}
    own = shapes if prefix else {name: shape for name, shape in shapes.items() if name.partition(".")[0] in words}
    parts = {denoiser.name: _part(own, prefix, _from_originals(denoiser))}
    vae_prefix = next((prefix for prefix in family.vae_prefixes if f"{prefix}decoder.conv_in.weight" in shapes), None)
    if vae_prefix is not None:
        num_levels = _part(shapes, vae_prefix, str).count("decoder.up.")
        parts[VAE] = _part(shapes, vae_prefix, lambda name: _vae_name(name, num_levels))
    for component, part in zip(family.text_encoders, _text_encoders(shapes, family), strict=False):
        parts[component.name] = part
    return parts


def load_file(path: Path, family: Family, dtype: torch.dtype) -> tuple[dict[str, Any], Prediction | None]:
    """Load what a file holds, as diffusers' pipelines take it, with tokenizers and a scheduler.

    Returns:
        The components by name, and what the file says that it predicts; the scheduler says None where that is None.

    Raises:
        ValueError: a part lacks weights, or has others than this family's.
    """
    header = read_header(path)
    prediction = stated_prediction(header.tensors, header.metadata, family)
    stated = None if prediction is None else prediction.type
    scheduler = make_scheduler(family, stated, HAS_ZERO_SNR in header.tensors)
    models = _load_models(path, family, find_parts(path, family), dtype)
    side = stated_size(header.metadata)
    if side is not None:
        models[family.denoiser.name].register_to_config(sample_size=side // family.vae_scale_factor)
    return models | {"scheduler": scheduler}, prediction


def stated_size(metadata: Mapping[str, str]) -> int | None:
    """The side in pixels of the pictures that a model was trained on, by ModelSpec's metadata; None without them."""
    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", ""))
    side = int(found[1]) if found and found[1] == found[2] else 0
    return side if side and side % 64 == 0 else None


def _load_models(path: Path, family: Family, parts: Mapping[str, Part], dtype: torch.dtype) -> dict[str, Any]:
    import diffusers
    import transformers

    found: dict[str, Any] = {}
    for component in family.text_encoders:
        if component.name in parts:
            text_config = transformers.CLIPTextConfig(**text_encoder_config(component, parts[component.name]))
            model = _empty(getattr(transformers, component.classes[0]), text_config)
            found[component.name] = _filled(path, component.title, model, parts[component.name], dtype)
            found[component.tokenizer] = clip_tokenizer(component.pad_token)
    if VAE in parts:
        vae = _empty(diffusers.AutoencoderKL.from_config, vae_config(family, parts[VAE]))
        found[VAE] = _filled(path, "VAE", vae, parts[VAE], dtype)
    denoiser = family.denoiser
    config = unet_config(family, parts[denoiser.name], _pooled_width(family, parts))
    unet = _empty(getattr(diffusers, denoiser.classes[0]).from_config, config)
    found[denoiser.name] = _filled(path, denoiser.title, unet, parts[denoiser.name], dtype, is_strict=True)
    return found


def make_scheduler(family: Family, prediction_type: str | None, has_zero_snr: bool) -> "SchedulerMixin":
    """The noise schedule that a family was trained with, which no single file holds.

    Args:
        has_zero_snr: it was trained on noise alone at the last timestep.
    """
    import diffusers

    name, config = family.scheduler
    if has_zero_snr:  # PNDM has none of it
        name = name if name == "EulerDiscreteScheduler" else "DDIMScheduler"
        known = {key: value for key, value in config.items() if key != "skip_prk_steps"}
        config = known | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return getattr(diffusers, name)(**config, prediction_type=prediction_type)


def unet_config(family: Family, part: Part, pooled_width: int) -> dict[str, Any]:
    """The config of a UNet by its shapes, but for the size of its pictures.

    Args:
        pooled_width: of the pooled prompt that it is told, if it is.

    Raises:
        ValueError: a tensor that tells is not there.
    """
    num_levels = part.count("down_blocks.")
    levels = range(num_levels)
    channels = [part.shape(f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    depths = [part.count(f"down_blocks.{level}.attentions.0.transformer_blocks.") for level in levels]
    middle = part.count("mid_block.attentions.0.transformer_blocks.")
    attended = next((level for level in levels if depths[level]), 0)
    first = f"down_blocks.{attended}.attentions.0"
    cross_width = part.shape(f"{first}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    kinds = [_ATTENDED if depth else _PLAIN for depth in depths]
    heads = family.denoiser.num_heads
    config: dict[str, Any] = {
        "_class_name": family.denoiser.classes[0],
        "in_channels": part.shape("conv_in.weight", 4)[1],
        "out_channels": part.shape("conv_out.weight", 4)[0],
        "block_out_channels": channels,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "layers_per_block": part.count("down_blocks.0.resnets."),
        # diffusers takes the deepest level's for the middle.
        "transformer_layers_per_block": _one([depth or 1 for depth in depths[:-1]] + [depths[-1] or middle or 1]),
        "attention_head_dim": heads or [width // _HEAD_WIDTH for width in channels],  # how many, despite its name
        "cross_attention_dim": cross_width,
        "use_linear_projection": len(part.renamed.get(f"{first}.proj_in.weight", ())) == 2,
    }
    if "add_embedding.linear_1.weight" in part.renamed:
        width = part.shape("add_embedding.linear_1.weight", 2)[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled_width) // _NUM_SIZES,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def vae_config(family: Family, part: Part) -> dict[str, Any]:
    """The config of a VAE by its shapes.

    Raises:
        ValueError: a tensor that tells is not there.
    """
    levels = range(part.count("encoder.down_blocks."))
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [
            part.shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels
        ],
        "down_block_types": [_PLAIN.format("DownEncoder")] * len(levels),
        "up_block_types": [_PLAIN.format("UpDecoder")] * len(levels),
        "layers_per_block": part.count("encoder.down_blocks.0.resnets."),
        "latent_channels": part.shape("decoder.conv_in.weight", 4)[1],
        "mid_block_add_attention": any("mid_block.attentions." in name for name in part.renamed),
        "scaling_factor": family.scaling_factor,
        "sample_size": family.versions[-1].size_px,
    }


def text_encoder_config(component: Component, part: Part) -> dict[str, Any]:
    """The config of a text encoder by its shapes.

    Raises:
        ValueError: a tensor that tells is not there, or it was trained with another tokenizer.
    """
    vocab_size, width = part.shape("embeddings.token_embedding.weight", 2)
    tokens = part.shape("embeddings.position_embedding.weight", 2)[0]
    if vocab_size != VOCABULARY_SIZE or tokens != MAX_TOKENS:
        raise ValueError(
            f"its {component.title} reads {tokens} of {vocab_size} tokens, and CLIP's tokenizer gives {MAX_TOKENS} of "
            f"{VOCABULARY_SIZE}; pass the model as a diffusers folder, with its own tokenizer"
        )
    # OpenCLIP's last layer is not used by SD2, whose files have it all the same.
    published = sum(path.endswith(".q_proj") for path in component.shapes)
    num_layers = part.count("encoder.layers.")
    ids = vocabulary()
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": part.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": min(num_layers, published) if part.is_openclip else num_layers,
        "num_attention_heads": width // _HEAD_WIDTH,
        "max_position_embeddings": tokens,
        "hidden_act": component.activation,
        "projection_dim": _projection_width(part) or width,
        "bos_token_id": ids[START],
        "eos_token_id": ids[END],
        "pad_token_id": ids[component.pad_token],
    }


def _one(values: list[int]) -> int | list[int]:
    """One number for all levels where they are equal, as published configs have it."""
    return values[0] if len(set(values)) == 1 else values


def _pooled_width(family: Family, parts: Mapping[str, Part]) -> int:
    """Of the last text encoder's projection in a file, or the published one's where the file has none."""
    component = family.text_encoders[-1]
    part = parts.get(component.name)
    return (part and _projection_width(part)) or next(iter(component.shapes.values()))[1]


def _projection_width(part: Part) -> int | None:
    """Of a text encoder's pooled state after its projection; None without one."""
    if "text_projection.weight" not in part.renamed:
        return None
    return part.shape("text_projection.weight", 2)[-1 if part.is_openclip else 0]


def _part(shapes: Shapes, prefix: str, rename: Rename, is_openclip: bool = False) -> Part:
    own = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    return Part(own, lambda name: rename(name.removeprefix(prefix)), is_openclip)


def _from_originals(component: Component) -> Rename:
    """The first authors' names of a component's tensors -> ours."""
    ours = {original: name for name, original in component.originals}
    num_words = max(original.count(".") + 1 for original in ours)

    def rename(name: str) -> str:
        words = name.split(".")
        for length in range(num_words, 0, -1):
            start = ".".join(words[:length])
            if start in ours:
                return ours[start] + name.removeprefix(start)
        return name

    return rename


def _text_encoders(shapes: Shapes, family: Family) -> list[Part]:
    """CLIP's text encoders in a file, the narrowest first; one where the family has one."""
    found = []
    for name in shapes:
        root, is_token_embedding, _ = name.partition("token_embedding.weight")
        if not is_token_embedding:
            continue
        is_openclip = not root.endswith("embeddings.")
        root = root if is_openclip else root.removesuffix("embeddings.").removesuffix(_LEVEL)
        found.append(_part(shapes, root, _openclip_name if is_openclip else _clip_name, is_openclip))
    found.sort(key=lambda part: part.shape("embeddings.token_embedding.weight", 2)[1])
    return found[: len(family.text_encoders)]


def _clip_name(name: str) -> str:
    return name.removeprefix(_LEVEL)


def _openclip_name(name: str) -> str:
    for theirs, ours in clip.OPENCLIP_NAMES:
        name = name.replace(theirs, ours)
    return name


def _vae_name(name: str, num_levels: int) -> str:
    """diffusers' name of a tensor of the VAE, which counts the decoder's levels from the other end."""
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    up = re.match(r"decoder\.up\.(\d+)\.", name)
    if up:
        name = f"decoder.up_blocks.{num_levels - 1 - int(up[1])}.{name.removeprefix(up[0])}"
    name = re.sub(r"\.mid\.block_([12])\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}.", name)
    attention = re.fullmatch(r"(.+)\.mid\.attn_1\.(.+)\.(weight|bias)", name)
    if attention:
        layer = _VAE_ATTENTION.get(attention[2], attention[2])
        return f"{attention[1]}.mid_block.attentions.0.{layer}.{attention[3]}"
    if not name.startswith(("encoder.", "decoder.")):
        return name
    name = name.replace(".block.", ".resnets.").replace(".nin_shortcut.", ".conv_shortcut.")
    name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    return name.replace(".norm_out.", ".conv_norm_out.")


def _empty(make: Callable[..., Any], config: Any) -> nn.Module:
    """A model without weights; its buffers, which no file holds, are there."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make(config)


def _filled(
    path: Path, title: str, model: nn.Module, part: Part, dtype: torch.dtype, is_strict: bool = False
) -> nn.Module:
    """Load a part's tensors into an empty model.

    Args:
        is_strict: the part holds nothing but the model's weights.
    """
    # transformers 5 dropped the level from its text encoder's names, and files have it or not.
    expected = {name.removeprefix(_LEVEL): (name, value.shape) for name, value in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    unknown = []
    for stored, tensor in iter_tensors(path, part.shapes):
        for ours, value in _split(part.rename(stored), tensor, part.is_openclip):
            if ours not in expected:
                unknown.append(stored)
                continue
            name, shape = expected[ours]
            weights[name] = _shaped(ours, value, shape).to(dtype)
    missing = [ours for ours, (name, _) in expected.items() if name not in weights]
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights of its {title}, such as {examples(missing)}; get the file "
                         f"again, or pass the model as a diffusers folder")  # fmt: skip
    if is_strict and unknown:
        raise ValueError(f"its {title} has {len(unknown)} tensors that no such model has, such as {examples(unknown)}; "
                         f"pass the plain text-to-image model")  # fmt: skip
    model.load_state_dict(weights, assign=True)
    return model


def _split(name: str, tensor: Tensor, is_openclip: bool) -> Iterator[tuple[str, Tensor]]:
    """Our tensors of one of a file: OpenCLIP stacks queries, keys and values, and its projection is transposed."""
    stacked = _STACKED.fullmatch(name)
    if stacked:
        for layer, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{stacked[1]}self_attn.{layer}_proj.{stacked[2]}", rows
    elif is_openclip and name == "text_projection.weight":
        yield name, tensor.mT
    else:
        yield name, tensor


def _shaped(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """A 1x1 convolution and a linear layer are one."""
    if tensor.shape != shape:
        if tensor.numel() != shape.numel() or {*tensor.shape[2:], *shape[2:]} != {1}:
            raise ValueError(f"its {name} has shape {tuple(tensor.shape)} where {tuple(shape)} is expected; pass the "
                             f"model as a diffusers folder")  # fmt: skip
        tensor = tensor.reshape(shape)
    return tensor.contiguous().clone() if tensor._is_view() else tensor
