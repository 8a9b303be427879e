"""Base models: the frozen Stable Diffusion that a person is fitted on.

A base is a Hugging Face id, a folder in diffusers' layout, or a single-file checkpoint (.safetensors) as Automatic1111
and kohya users have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hypernet.base_files import check_channels, check_checkpoint, check_folder, mend_text_encoder
from hypernet.devices import choose_device, choose_dtype
from hypernet.errors import first_sentence
from hypernet.recipe import DEFAULT_BASE
from lidb_peft.safe_read import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class PromptEmbeds(NamedTuple):
    """What a UNet is told of n prompts.

    Attributes:
        hidden: the text encoders' states, ``(n, tokens, width)``.
        pooled: SDXL's summary of each prompt, ``(n, width)``; None for others.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor) -> "PromptEmbeds":
        """The prompts at ``index`` ``(m,)``, in its order."""
        return PromptEmbeds(self.hidden[index], None if self.pooled is None else self.pooled[index])

    @staticmethod
    def concatenate(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """The prompts of all parts, one part after the other; all are of one base."""
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return PromptEmbeds(torch.cat([part.hidden for part in parts]), pooled)


@dataclass
class BaseModel:
    """A frozen Stable Diffusion 1.x, 2.x or XL, its parts as diffusers and transformers classes.

    Attributes:
        name: the id, folder or file it came from.
        family: ``sd1``, ``sd2`` or ``sdxl``, as `converters` names the architectures.
        text_encoder_2, tokenizer_2: SDXL's second ones; None for others.
    """

    name: str
    family: str
    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    vae: "AutoencoderKL"
    scheduler: "SchedulerMixin"
    text_encoder_2: "CLIPTextModelWithProjection | None" = None
    tokenizer_2: "CLIPTokenizer | None" = None

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def text_encoders(self) -> "list[CLIPTextModel | CLIPTextModelWithProjection]":
        """Those there are, one or two."""
        return [self.text_encoder] if self.text_encoder_2 is None else [self.text_encoder, self.text_encoder_2]

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """The models whose attention projections are adapted, by component name."""
        return {"unet": self.unet} | dict(zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=False))

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: ``epsilon`` or ``v_prediction``."""
        return self.scheduler.config.prediction_type

    @property
    def size_px(self) -> int:
        """The side of the square pictures it was trained on."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The noise schedule, ``(num_train_timesteps,)`` float32 on the base's device."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    def token_ids(self, prompt: str) -> Tensor:
        """Token ids ``(1, E, model_max_length)`` for E text encoders, padded as the pipeline pads them."""
        tokenizers = [self.tokenizer] if self.tokenizer_2 is None else [self.tokenizer, self.tokenizer_2]
        ids = [
            tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
            for tokenizer in tokenizers
        ]
        return torch.tensor([ids], device=self.device)

    def encode(self, ids: Tensor) -> PromptEmbeds:
        """What the text encoders make of token ids ``(n, E, tokens)``, as the pipeline asks them; differentiable."""
        if self.text_encoder_2 is None:
            return PromptEmbeds(self.text_encoder(ids[:, 0])[0])
        first, second = (
            encoder(part, output_hidden_states=True)
            for encoder, part in zip(self.text_encoders, ids.unbind(1), strict=True)
        )
        # SDXL was trained on the last but one layer of both.
        return PromptEmbeds(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds)

    @cached_property
    def time_ids(self) -> Tensor:
        """What SDXL's UNet is told of a picture: that it is whole and of the trained size, ``(6,)`` on the device."""
        original = target = (self.size_px, self.size_px)
        crop_top_left = (0, 0)
        return torch.tensor([*original, *crop_top_left, *target], dtype=self.dtype, device=self.device)

    def pipeline(self) -> "StableDiffusionPipeline":
        """The same parts, not copies, as a pipeline that draws pictures."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae.to(self.device), text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load_base(source: str = DEFAULT_BASE, device: str = "auto", precision: str = "auto") -> BaseModel:
    """Load a frozen base model; weights are read from safetensors only and never unpickled.

    Raises:
        ValueError: the source is not a Stable Diffusion 1.x or 2.x, or is a pickled checkpoint.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    torch_device = choose_device(device)
    dtype = choose_dtype(precision, torch_device)
    path = Path(source)
    if path.is_file():
        pipeline = _load_single_file(path, dtype)
    elif path.is_dir():
        pipeline = _load_folder(path, dtype)
    else:
        pipeline = _load_from_hub(source, dtype)
    _check_architecture(source, pipeline)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False).eval().to(torch_device)
    return BaseModel(
        name=source,
        family=_family(pipeline),
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
    )


def _load_folder(folder: Path, dtype: torch.dtype) -> "StableDiffusionPipeline":
    variant = check_folder(folder)
    try:
        pipeline = _load_pretrained(str(folder), dtype, variant=variant)
    except (OSError, ValueError, RuntimeError) as error:  # configs that do not fit the weights, or each other
        raise ValueError(f"{folder} cannot be loaded as a Stable Diffusion: {first_sentence(error)}") from error
    mend_text_encoder(folder / "text_encoder", variant, pipeline.text_encoder)
    return pipeline


def _load_pretrained(source: str, dtype: torch.dtype, **options) -> "StableDiffusionPipeline":
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        source,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        use_safetensors=True,
        **_dtype_argument(dtype),
        **options,
    )


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """diffusers called this argument ``torch_dtype`` until it deprecated that."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


def _load_from_hub(source: str, dtype: torch.dtype) -> "StableDiffusionPipeline":
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(source).suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        raise FileNotFoundError(f"{source} does not exist; check the path of the checkpoint")
    try:
        validate_repo_id(source)
        return _load_pretrained(source, dtype)
    except (HFValidationError, OSError) as error:
        is_telling = isinstance(error, HfHubHTTPError) or getattr(error, "errno", None)  # gated, disk full
        reason = f" ({first_sentence(error)})" if is_telling else ""
        raise FileNotFoundError(
            f"the base model {source!r} is not a folder or file here and could not be had from the Hugging Face hub; "
            f"connect to the internet and try again, or pass --base with a diffusers folder or a .safetensors "
            f"checkpoint that you have, or pass --base testbed for the miniature that ships with this package{reason}"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source} cannot be loaded as a Stable Diffusion: {first_sentence(error)}") from error


def _load_single_file(path: Path, dtype: torch.dtype) -> "StableDiffusionPipeline":
    """A checkpoint has neither tokenizer nor configuration: diffusers takes both from the hub, or from its cache."""
    from diffusers import StableDiffusionPipeline

    check_checkpoint(path)
    try:
        return StableDiffusionPipeline.from_single_file(str(path), safety_checker=None, **_dtype_argument(dtype))
    except OSError as error:
        raise FileNotFoundError(
            f"{path} holds weights only, and the tokenizer and configuration that go with it (3 MB) could not be had "
            f"from the Hugging Face hub; connect to the internet once, or pass --base with a diffusers folder "
            f"({first_sentence(error)})"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded as a Stable Diffusion: {first_sentence(error)}") from error


def _check_architecture(source: str, pipeline: "StableDiffusionPipeline") -> None:
    read, given = pipeline.unet.config.cross_attention_dim, pipeline.text_encoder.config.hidden_size
    if read != given:
        raise ValueError(
            f"{source} has a UNet that reads prompts of width {read} and a text encoder of width {given} "
            f"(an SDXL model? it is not supported yet); pass an SD 1.x or 2.x base"
        )
    check_channels(source, pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        missing = [name for name, parameter in part.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{source} lacks {len(missing)} weights of its {type(part).__name__}, {missing[0]} for "
                             f"one; download the base model again")  # fmt: skip
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{source} predicts {prediction!r}; expected 'epsilon' or 'v_prediction'")


def _family(pipeline: "StableDiffusionPipeline") -> str:
    """SD2.x took OpenCLIP's text encoder of width 1024; everything else of this shape is SD1.x to its readers."""
    return "sd2" if pipeline.unet.config.cross_attention_dim == 1024 else "sd1"
