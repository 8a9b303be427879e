"""The hypernetwork's eye: a vision transformer of the transformers library, and how it wants its pictures.

ViT, CLIP and SigLIP vision towers, DINOv2: whatever gives one vector for each patch.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hypernet.errors import first_line
from hypernet.hub import HYPERNETWORK_FILES, local_or_hub_folder
from hypernet.quiet import quiet_libraries
from lidb_peft.safe_read import check_indices, read_json_object

# Parts that make one vector of a picture, or replace masked patches; the patches' own vectors do not pass through them.
_UNUSED = re.compile(r"(^|\.)(pooler|head|post_layernorm|mask_token)(\.|$)")


def load_encoder(source: str | Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a pretrained encoder by id or folder, float32, and how it wants its pictures (see `picture_settings`).

    Of a model with two towers, such as CLIP, the vision tower.

    Raises:
        FileNotFoundError: it is neither here nor on the hub.
        ValueError: it is no vision transformer, or lacks weights.
    """
    folder = local_or_hub_folder(source, "the encoder", HYPERNETWORK_FILES)
    try:
        with torch.random.fork_rng(devices=[]), quiet_libraries():  # transformers draws weights that it does not find
            check_indices(folder, "get the encoder again")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config = getattr(config, "vision_config", config)
            check_encoder(config)
            encoder, info = AutoModel.from_pretrained(
                folder, config=config, use_safetensors=True, output_loading_info=True
            )
        settings = picture_settings(folder)
    except OSError as error:
        raise FileNotFoundError(
            f"the encoder {str(source)!r} lacks config.json or model.safetensors ({first_line(error)}); get it again"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if not is_unused(name))
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of its encoder, e.g. {missing[0]}; get it again")
    return encoder.float(), settings


def check_encoder(config: PretrainedConfig) -> None:
    """Raise ValueError unless ``config`` is a vision transformer's on square pictures."""
    if not isinstance(getattr(config, "image_size", None), int) or not hasattr(config, "patch_size"):
        raise ValueError(f"the encoder is a {config.model_type!r}; choose a vision transformer: ViT, CLIP or DINOv2")


def is_unused(name: str) -> bool:
    """Tell whether a parameter of an encoder takes no part in its patches' vectors, and so never gets a gradient."""
    return _UNUSED.search(name) is not None


def picture_settings(source: str | Path) -> dict[str, Any]:
    """Return ``image_size`` (pixels), ``image_mean`` and ``image_std`` (for [0, 1]) of an encoder's image processor.

    What it does not say is left out. The file is read rather than the processor made, which would need torchvision.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found = read_json_object(Path(file), "get the encoder again")
            found = found.get("image_processor", found)
            size = found.get("crop_size") or found.get("size") or {}
            size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
            settings = {"image_size": size, **{key: found.get(key) for key in ("image_mean", "image_std")}}
            return {key: value for key, value in settings.items() if value is not None}
    return {}


def prepare_pictures(pixels: Tensor, size_px: int, mean: list[float], std: list[float]) -> Tensor:
    """Make ``pixels`` ``(B, 3, h, w)`` in [-1, 1] what an encoder expects, ``(B, 3, size_px, size_px)`` float32.

    As image processors do it: antialiased bicubic, cut to the range of pictures, then normalised.
    """
    pixels = pixels.float() / 2 + 0.5
    if pixels.shape[-2:] != (size_px, size_px):
        pixels = F.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True).clamp(0, 1)
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
