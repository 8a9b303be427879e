"""FLUX.1: a transformer that predicts the velocity from data to noise (rectified flow).

CLIP says a summary of the prompt and T5 its tokens; the published dev model is also told the guidance scale that it was
distilled with. The way it is trained follows diffusers' ``examples/dreambooth/train_dreambooth_lora_flux.py`` and
kohya's ``flux_train_network.py``: target noise - latents, no weighting, timesteps as sd-scripts'
``--timestep_sampling flux_shift`` draws them, guidance scale 1.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hypernet.base_models.base import BaseModel, PromptEmbeds, Prompts, check_all_loaded, sample_moments
from hypernet.base_models.flux_file import load_transformer

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel

PATCH = 2  # latents to a token's side
NUM_TIMESTEPS = 1000
TOKENS = {True: 512, False: 256}  # of T5, by whether the model is told a guidance scale: dev, schnell


def pack(latents: Tensor) -> Tensor:
    """Latents ``(n, c, h, w)`` as the transformer's tokens, ``(n, h / 2 * w / 2, 4 * c)``."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (n, c, h / 2, 2, w / 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`; height and width are the latents'."""
    grid = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(height: int, width: int) -> Tensor:
    """The place of each token, ``(h / 2 * w / 2, 3)``: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def shifted_sigmas(positions: Tensor, shift: float, highest: float = 1.0) -> Tensor:
    """Noise levels ``(n,)`` at the quantiles ``positions`` in [0, 1) of those below ``highest``.

    sigma = shift * t / (1 + (shift - 1) * t) with a logit-normal t (Esser et al. 2024, section 3.1 and equation 23);
    what sd-scripts draws as ``shift`` and ``flux_shift``.
    """
    unshifted = torch.tensor(highest, dtype=torch.float64)
    unshifted = unshifted / (shift - (shift - 1) * unshifted)
    share = torch.special.ndtr(torch.logit(unshifted))  # of the distribution that is below
    normal = torch.special.ndtri(positions.double().clamp(min=1e-7) * share)
    t = normal.sigmoid()
    return (shift * t / (1 + (shift - 1) * t)).float()


@dataclass
class Flux(BaseModel):
    """A frozen FLUX.1. On a GPU, T5 and the transformer are never there together.

    Attributes:
        text_encoder, tokenizer: CLIP's, whose pooled state is used.
        text_encoder_2, tokenizer_2: T5's; it stays on the CPU but for `prepare_prompts`.
        home: the device that it works on; the transformer comes there with the first `denoise`.
        compute_dtype: what the transformer computes in, however its weights are stored.
        train_text_encoder: CLIP is adapted too.
        guidance_scale: the transformer's guidance input while fitting.
        quantize: how its blocks' weights are stored, None for `compute_dtype`.
    """

    transformer: "FluxTransformer2DModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    text_encoder_2: "T5EncoderModel"
    tokenizer_2: "PreTrainedTokenizerBase"
    home: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compute_dtype: torch.dtype = torch.float32
    train_text_encoder: bool = False
    guidance_scale: float = 1.0
    quantize: str | None = None
    _read: dict[str, Tensor] = field(default_factory=dict, repr=False)

    title: ClassVar[str] = "FLUX.1"
    families: ClassVar[tuple[str, ...]] = ("flux1",)
    options: ClassVar[frozenset[str]] = frozenset({"train_text_encoder", "quantize", "guidance_scale"})
    guidance: ClassVar[float] = 3.5

    @classmethod
    def from_pipeline(  # type: ignore[override]  # its options are those that `options` lists
        cls,
        name: str,
        pipeline: "FluxPipeline",
        device: torch.device,
        train_text_encoder: bool = False,
        quantize: str | None = None,
        guidance_scale: float | None = None,
    ) -> "Flux":
        """Take over the components of diffusers' pipeline.

        Raises:
            ValueError: they do not go together, lack weights, or are another model than text-to-image FLUX.1.
        """
        _check_components(name, pipeline)
        transformer, compute_dtype = pipeline.transformer, pipeline.transformer.dtype
        if guidance_scale is not None and not transformer.config.guidance_embeds:
            raise ValueError(f"{name} takes no guidance scale (FLUX.1 schnell?); leave --guidance-scale out")
        if quantize is not None:
            from hypernet.base_models.quantization import quantize_blocks

            quantize_blocks(transformer, quantize, compute_dtype)
        base = cls(
            name=name,
            vae=pipeline.vae,
            scheduler=pipeline.scheduler,
            transformer=transformer,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            text_encoder_2=pipeline.text_encoder_2,
            tokenizer_2=pipeline.tokenizer_2,
            home=device,
            compute_dtype=compute_dtype,
            train_text_encoder=train_text_encoder,
            guidance_scale=1.0 if guidance_scale is None else guidance_scale,
            quantize=quantize,
        )
        for model in (base.transformer, base.text_encoder, base.text_encoder_2, base.vae):
            model.requires_grad_(False).eval()
        text_encoder: nn.Module = base.text_encoder
        text_encoder.to(device)
        if device.type == "cpu" or quantize is not None:
            base.transformer.to(device)  # which is when it is quantised
        return base

    @classmethod
    def load_denoiser(cls, path: Path, config_folder: Path, dtype: torch.dtype) -> nn.Module:
        return load_transformer(path, config_folder, dtype)

    @property
    def denoiser(self) -> nn.Module:
        return self.transformer

    @property
    def adapted(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer} | (
            {"text_encoder": self.text_encoder} if self.train_text_encoder else {}
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {"guidance_scale": self.guidance_scale, "quantize": self.quantize}

    @property
    def device(self) -> torch.device:
        return self.home

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def prediction_type(self) -> str:
        """``flow``: noise - latents."""
        return "flow"

    @property
    def size_px(self) -> int:
        return self.vae.config.sample_size

    @cached_property
    def shift(self) -> float:
        """How far noise levels are shifted up at this size, as the scheduler shifts those it draws at."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        slope = (config.max_shift - config.base_shift) / (high - low)
        _, height, width = self.latent_shape
        mu = config.base_shift + slope * (height * width // PATCH**2 - low)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    @cached_property
    def image_ids(self) -> Tensor:
        """Of pictures of `size_px`, on the device."""
        return image_ids(*self.latent_shape[1:]).to(self.home, self.compute_dtype)

    def prepare_prompts(self, texts: Sequence[str]) -> Prompts:
        """CLIP's token ids, and T5's states ``(n, 512, width)``, which are computed once for each text."""
        self._read_new([text for text in dict.fromkeys(texts) if text not in self._read])
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)["input_ids"]
        token_ids = torch.tensor(ids, device=self.home)[:, None]
        return Prompts(token_ids, torch.stack([self._read[text] for text in texts]))

    @torch.no_grad()
    def _read_new(self, texts: Sequence[str]) -> None:
        """Let T5 read texts, while the transformer is elsewhere."""
        if not texts:
            return
        length = TOKENS[self.transformer.config.guidance_embeds]
        with self._instead_of_transformer(self.text_encoder_2):
            for text in texts:
                ids = self.tokenizer_2(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
                self._read[text] = self.text_encoder_2(torch.tensor([ids], device=self.home))[0][0]

    @contextmanager
    def _instead_of_transformer(self, model: nn.Module) -> Iterator[None]:
        if self.home.type == "cpu":
            yield
            return
        if self._is_at_home:
            self.transformer.to("cpu")
        model.to(self.home)
        try:
            yield
        finally:
            model.to("cpu")
            if self.home.type == "cuda":
                torch.cuda.empty_cache()

    def settle(self) -> None:
        if not self._is_at_home:
            self.transformer.to(self.home)

    @property
    def _is_at_home(self) -> bool:
        return next(self.transformer.parameters()).device.type == self.home.type

    def encode_prompts(self, prompts: Prompts) -> PromptEmbeds:
        """T5's states as they were read, and CLIP's pooled state."""
        assert prompts.prompt_embeds is not None, "prompts that T5 has not read"
        pooled = self.text_encoder(prompts.token_ids[:, 0], output_hidden_states=False).pooler_output
        return PromptEmbeds(prompts.prompt_embeds, pooled.to(self.compute_dtype))

    def timesteps(self, positions: Tensor, max_timestep: int) -> Tensor:
        """Logit-normal, shifted for the size of the picture; float32 in [0, 1000]."""
        return NUM_TIMESTEPS * shifted_sigmas(positions, self.shift, max_timestep / NUM_TIMESTEPS)

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        return (sample_moments(moments, noise) - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / NUM_TIMESTEPS).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity of the straight way from latents to noise (Liu et al. 2022, equation 1)."""
        return noise - latents

    def finished(self, noisy_latents: Tensor, noise_pred: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (timesteps / NUM_TIMESTEPS).view(-1, 1, 1, 1)
        return noisy_latents - sigma * noise_pred, noisy_latents + (1 - sigma) * noise_pred

    def encode_no_prompt(self, asked: PromptEmbeds) -> None:
        """FLUX.1 is distilled from guidance."""

    def denoise(self, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        self.settle()
        count, _, height, width = noisy_latents.shape
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], self.guidance_scale, device=self.home).expand(count)
        text = prompt_embeds.prompt_embeds
        velocity = self.transformer(
            hidden_states=pack(noisy_latents.to(self.compute_dtype)),
            timestep=timesteps.to(self.compute_dtype) / NUM_TIMESTEPS,
            guidance=guidance,
            pooled_projections=prompt_embeds.pooled_prompt_embeds,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=self.home, dtype=self.compute_dtype),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return unpack(velocity, height, width).float()

    def pipeline(self) -> "FluxPipeline":
        """Without T5: `pipeline_inputs` are embeddings."""
        from diffusers import FluxPipeline

        self.settle()
        pipeline = FluxPipeline(
            scheduler=self.scheduler, vae=self.vae.to(self.home), text_encoder=self.text_encoder,
            tokenizer=self.tokenizer, text_encoder_2=None, tokenizer_2=self.tokenizer_2, transformer=self.transformer,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(
        self, texts: Sequence[str], guidance: float, negative: str = "", clip_skip: int = 1
    ) -> dict[str, Any]:
        if negative:
            raise ValueError(f"{self.name} is distilled from guidance and takes no negative prompt; leave it out")
        if clip_skip != 1:
            raise ValueError(f"clip skip is {clip_skip}, and {self.name} reads only CLIP's summary; leave it at 1")
        embeds = self.encode_prompts(self.prepare_prompts(texts))
        return {
            "prompt_embeds": embeds.prompt_embeds,
            "pooled_prompt_embeds": embeds.pooled_prompt_embeds,
            "guidance_scale": guidance,
        }


def _check_components(source: str, pipeline: "FluxPipeline") -> None:
    transformer, vae = pipeline.transformer, pipeline.vae
    channels, latent_channels = transformer.config.in_channels, vae.config.latent_channels
    if channels != latent_channels * PATCH**2:
        raise ValueError(
            f"{source} has a transformer with {channels} input channels, expected {latent_channels * PATCH**2} (a "
            f"Fill, Canny or Depth model?); pass the plain text-to-image model"
        )
    read, given = transformer.config.joint_attention_dim, pipeline.text_encoder_2.config.d_model
    pooled, summary = transformer.config.pooled_projection_dim, pipeline.text_encoder.config.hidden_size
    if (read, pooled) != (given, summary):
        raise ValueError(
            f"{source} has a transformer that reads prompts of widths {read} and {pooled} and text encoders of widths "
            f"{given} and {summary}; pass a FLUX.1 base whose components belong together"
        )
    check_all_loaded(source, transformer, pipeline.text_encoder, pipeline.text_encoder_2, vae)
    if type(pipeline.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(
            f"{source} comes with a {type(pipeline.scheduler).__name__}, which adds noise otherwise than FLUX.1; pass "
            f"a folder with its own scheduler"
        )
