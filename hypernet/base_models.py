"""Base models: the frozen Stable Diffusion that a person is fitted on.

A base is a Hugging Face id, a folder in diffusers' layout, or a single-file checkpoint (.safetensors) as Automatic1111
and kohya users have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hypernet.base_loading import PIPELINE_OPTIONS, load_pipeline
from hypernet.devices import choose_device, choose_dtype
from hypernet.errors import first_sentence
from hypernet.recipe import ATTENTIONS, DEFAULT_BASE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
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
        text_encoder_2, tokenizer_2: SDXL's second ones; None for others.
        zeros_for_no_prompt: SDXL was trained to take zeros for the embeddings of no prompt; some of its kind were not.
    """

    name: str
    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    vae: "AutoencoderKL"
    scheduler: "SchedulerMixin"
    text_encoder_2: "CLIPTextModelWithProjection | None" = None
    tokenizer_2: "CLIPTokenizer | None" = None
    zeros_for_no_prompt: bool = True

    @property
    def family(self) -> str:
        """``sd1``, ``sd2`` or ``sdxl``, as `converters` names the architectures."""
        if self.text_encoder_2 is not None:
            return "sdxl"
        # SD2.x took OpenCLIP's text encoder of width 1024; everything else of this shape is SD1.x to its readers.
        return "sd2" if self.unet.config.cross_attention_dim == 1024 else "sd1"

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device  # its own property goes through all of its modules

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

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

    def pipeline(self) -> "StableDiffusionPipeline | StableDiffusionXLPipeline":
        """The same parts, not copies, as a pipeline that draws pictures."""
        import diffusers

        kind = "StableDiffusionPipeline" if self.text_encoder_2 is None else "StableDiffusionXLPipeline"
        parts = {"tokenizer": self.tokenizer, "scheduler": self.scheduler, "vae": self.vae.to(self.device)}
        if self.tokenizer_2 is not None:
            parts |= {"tokenizer_2": self.tokenizer_2, "force_zeros_for_empty_prompt": self.zeros_for_no_prompt}
        pipeline = getattr(diffusers, kind)(**self.adapted, **parts, **PIPELINE_OPTIONS[kind])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load_base(
    source: str = DEFAULT_BASE,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    compile: bool = False,
) -> BaseModel:
    """Load a frozen base model; weights are read from safetensors only and never unpickled.

    Args:
        attention: of the UNet, ``sdpa`` (torch's own) or ``xformers``; ``auto`` is ``sdpa``.
        compile: compile the UNet at its first use, by `torch.compile`, which takes minutes.

    Raises:
        ValueError: the source is not a Stable Diffusion 1.x, 2.x or XL, or is a pickled checkpoint; or xformers is
            asked for and not to be had.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; choose {', '.join(ATTENTIONS)}")
    torch_device = choose_device(device)
    pipeline = load_pipeline(source, choose_dtype(precision, torch_device))
    base = BaseModel(
        name=source,
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        text_encoder_2=getattr(pipeline, "text_encoder_2", None),
        tokenizer_2=getattr(pipeline, "tokenizer_2", None),
        zeros_for_no_prompt=pipeline.config.get("force_zeros_for_empty_prompt", True),
    )
    for part in (*base.adapted.values(), base.vae):
        part.requires_grad_(False).eval().to(torch_device)
    if attention == "xformers":
        _use_xformers(base.unet)
    if compile:
        base.unet.compile()
    return base


def _use_xformers(unet: "UNet2DConditionModel") -> None:
    try:
        if find_spec("xformers") is None:
            raise ModuleNotFoundError("it is not installed")
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # built for another torch, no CUDA, or a card that it does not know
        raise ValueError(
            f"attention xformers cannot be had ({first_sentence(error)}); pip install 'lidb-peft[cuda]' on a machine "
            f"with CUDA, or choose sdpa"
        ) from error
