"""The networks that judge pictures: DINO and CLIP by transformers, by id or folder, each with its own preprocessing."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

from hypernet.errors import first_line
from hypernet.hub import HYPERNETWORK_FILES, local_or_hub_folder
from hypernet.inputs.photos import to_pixels
from hypernet.network.encoder import load_encoder, picture_settings, prepare_pictures
from hypernet.quiet import quiet_libraries
from lidb_peft.safe_read import check_indices

DINO = "facebook/dino-vits16"
CLIP = "openai/clip-vit-large-patch14"
AT_ONCE = 16  # pictures
_TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
_COMMIT_CHARS = 40


@dataclass(frozen=True)
class Dino:
    """Self-supervised features of whole pictures: those of the token that stands for the picture.

    Attributes:
        source: an id or a folder.
        revision: the commit of an id, a digest of a folder's weights.
    """

    source: str
    revision: str
    model: PreTrainedModel
    settings: dict

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of unit length, ``(n, width)``."""
        return _features(pictures, self.settings, self.model, lambda pixels: self.model(pixels).last_hidden_state[:, 0])


@dataclass(frozen=True)
class Clip:
    """Features in which a picture and the words for it lie close together.

    Attributes:
        source, revision: as of `Dino`.
    """

    source: str
    revision: str
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    settings: dict

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of pictures, of unit length, ``(n, width)``."""
        model = self.model
        return _features(
            pictures,
            self.settings,
            model,
            lambda pixels: model.visual_projection(model.vision_model(pixels).pooler_output),
        )

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, cut to what CLIP reads, of unit length, ``(n, width)``."""
        settings: Any = self.model.config.text_config
        most = settings.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        read = self.model.text_model(**{name: tokens[name].to(self.model.device) for name in _READ})
        return normalize(self.model.text_projection(read.pooler_output).float().cpu(), dim=1)


_READ = ("input_ids", "attention_mask")


def load_dino(source: str = DINO, device: torch.device | str = "cpu") -> Dino:
    """Load a DINO or DINOv2 by id or folder.

    Raises:
        FileNotFoundError: it is neither here nor on the hub.
        ValueError: it is no vision transformer, or lacks weights or its preprocessing.
    """
    folder = local_or_hub_folder(source, "the DINO", HYPERNETWORK_FILES, "or pass --dino none")
    model, settings = load_encoder(folder)
    return Dino(str(source), revision_of(folder), model.eval().requires_grad_(False).to(device),
                _checked(settings, source))  # fmt: skip


def load_clip(source: str = CLIP, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP by id or folder; raises as `load_dino`."""
    files = (*HYPERNETWORK_FILES, *_TOKENIZER_FILES)
    folder = local_or_hub_folder(source, "the CLIP", files, "or pass --clip none")
    try:
        with torch.random.fork_rng(devices=[]), quiet_libraries():
            check_indices(folder, "get CLIP again")
            kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
            if kind != "clip":
                raise ValueError(f"{source} is a {kind!r} and no CLIP; choose one, such as {CLIP}")
            loaded: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(f"{source} holds no CLIP with its tokenizer, weights as safetensors "
                                f"({first_line(error)}); get it again") from error  # fmt: skip
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks {len(info['missing_keys'])} weights of CLIP, e.g. "
                         f"{min(info['missing_keys'])}; get it again")  # fmt: skip
    model = model.float().eval().requires_grad_(False).to(device)
    return Clip(str(source), revision_of(folder), model, tokenizer, _checked(picture_settings(folder), source))


def revision_of(folder: Path) -> str:
    """The commit of a folder in the hub's cache; of another folder a digest of its weights."""
    if folder.parent.name == "snapshots" and len(folder.name) == _COMMIT_CHARS:
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
    return f"sha256:{digest.hexdigest()[:16]}"


def _checked(settings: dict, source: str) -> dict:
    missing = {"image_size", "image_mean", "image_std"} - set(settings)
    if missing:
        raise ValueError(f"{source} does not say how it wants its pictures: its preprocessor_config.json lacks "
                         f"{', '.join(sorted(missing))}; get it again")  # fmt: skip
    return settings


def _features(
    pictures: Sequence[Image.Image], settings: dict, model: PreTrainedModel, look: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``look`` makes of pictures ``(n, 3, size, size)``, a few at a time, of unit length, ``(n, width)``."""
    parts = [
        look(_prepared(pictures[first : first + AT_ONCE], settings).to(model.device))
        for first in range(0, len(pictures), AT_ONCE)
    ]
    return normalize(torch.cat(parts).float().cpu(), dim=1)


def _prepared(pictures: Sequence[Image.Image], settings: dict) -> Tensor:
    return torch.cat([
        prepare_pictures(to_pixels(each)[None], settings["image_size"], settings["image_mean"], settings["image_std"])
        for each in pictures
    ])  # fmt: skip
