"""Stable Diffusion 1.x, 2.x and XL: a UNet that predicts the noise, or the velocity, of a discrete noise schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from hypernet.base_models.base import BaseModel, PromptEmbeds, Prompts, check_all_loaded
from hypernet.base_models.checkpoints import check_channels
from hypernet.base_models.prediction import EPSILON, Prediction, V, measured_prediction
from hypernet.base_models.stable_diffusion_file import find_parts, load_file
from lidb_peft.families import Family, family_of_pipeline, get_family

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


_ASKED_SIDE = 32  # latents to a side, where the UNet is asked what it predicts


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """q(x_t | x_0), Ho et al. 2020, equation 4. ``alphas_cumprod`` ``(n,)`` at each sample's timestep."""
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def prediction_target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """What the UNet should predict: the noise, or the velocity of Salimans & Ho 2022, appendix D."""
    if prediction_type == "epsilon":
        return noise
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


@dataclass
class StableDiffusion(BaseModel):
    """A frozen Stable Diffusion 1.x, 2.x or XL.

    Attributes:
        text_encoder_2, tokenizer_2: SDXL's second ones; None for others.
        zeros_for_no_prompt: SDXL was trained to take zeros for the embeddings of no prompt; some of its kind were not.
        prediction_reason: how it is known what the UNet predicts.
        is_contradicted: somebody asked for another prediction than the base says of itself.
    """

    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    text_encoder_2: "CLIPTextModelWithProjection | None" = None
    tokenizer_2: "CLIPTokenizer | None" = None
    zeros_for_no_prompt: bool = True
    prediction_reason: str = ""
    is_contradicted: bool = False

    title: ClassVar[str] = "Stable Diffusion"
    families: ClassVar[tuple[str, ...]] = ("sd1", "sd2", "sdxl")
    options: ClassVar[frozenset[str]] = frozenset({"prediction"})
    guidance: ClassVar[float] = 7.5

    @classmethod
    def parts_of_file(cls, path: Path, family: Family) -> list[str]:
        return list(find_parts(path, family))

    @classmethod
    def load_file(cls, path: Path, family: Family, dtype: torch.dtype) -> tuple[dict[str, Any], Prediction | None]:
        return load_file(path, family, dtype)

    @classmethod
    def from_pipeline(  # type: ignore[override]  # its options are those that `options` lists
        cls, name: str, pipeline: "Pipeline", device: torch.device, prediction: Prediction | None = None
    ) -> "StableDiffusion":
        """Take over the components of diffusers' pipeline.

        Args:
            prediction: what the UNet predicts; None for what the scheduler says, or for a measurement where it says
                nothing.

        Raises:
            ValueError: they do not go together, lack weights, or are not those of a plain Stable Diffusion.
        """
        _check_components(name, pipeline)
        base = cls(
            name=name,
            vae=pipeline.vae,
            scheduler=pipeline.scheduler,
            unet=pipeline.unet,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            text_encoder_2=getattr(pipeline, "text_encoder_2", None),
            tokenizer_2=getattr(pipeline, "tokenizer_2", None),
            zeros_for_no_prompt=pipeline.config.get("force_zeros_for_empty_prompt", True),
        )
        for model in (*base.adapted.values(), base.vae):
            model.requires_grad_(False).eval().to(device)
        # The pipeline hands over latents in the UNet's dtype, see `pipeline`.
        if base.vae.post_quant_conv is not None:
            base.vae.post_quant_conv.register_forward_pre_hook(_as_weights)
        base._settle(prediction)
        return base

    def _settle(self, prediction: Prediction | None) -> None:
        """Decide what the UNet predicts, and with it which published model this is, where no config says its size."""
        if prediction is None and self.prediction_type is not None:
            prediction = Prediction(self.prediction_type, "its scheduler says so")
        is_sized = self.unet.config.sample_size is not None
        if not is_sized:  # SDXL is told its size where it is asked
            self._take_size("" if prediction is None else prediction.type)
        found = prediction or measured_prediction(self.noise_returned())
        self.is_contradicted = prediction is not None and prediction.type != self.prediction_type
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config, prediction_type=found.type)
        self.prediction_reason = found.reason
        if not is_sized:
            self._take_size(found.type)

    def _take_size(self, prediction_type: str) -> None:
        family = get_family(self.family)
        self.unet.register_to_config(sample_size=family.version(prediction_type).size_px // family.vae_scale_factor)

    @torch.no_grad()
    def noise_returned(self) -> float:
        """The correlation of noise with what the UNet predicts of it at the last timestep, without a prompt."""
        shape = (1, self.unet.config.in_channels, _ASKED_SIDE, _ASKED_SIDE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        last = torch.tensor([self.scheduler.config.num_train_timesteps - 1], device=self.device)
        predicted = self.denoise(noise, last, self.encode_prompts(self.prepare_prompts([""])))
        return torch.cosine_similarity(noise.flatten(), predicted.flatten(), dim=0).item()

    @property
    def _pipeline_class(self) -> str:
        return "StableDiffusionPipeline" if self.text_encoder_2 is None else "StableDiffusionXLPipeline"

    @property
    def family(self) -> str:
        return family_of_pipeline(self._pipeline_class, self.unet.config).name

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def text_encoders(self) -> "list[CLIPTextModel | CLIPTextModelWithProjection]":
        """Those there are, one or two."""
        return [self.text_encoder] if self.text_encoder_2 is None else [self.text_encoder, self.text_encoder_2]

    @property
    def adapted(self) -> dict[str, nn.Module]:
        return {"unet": self.unet} | dict(zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=False))

    @property
    def prediction_type(self) -> str:
        """``epsilon`` or ``v_prediction``."""
        return self.scheduler.config.prediction_type

    @property
    def size_px(self) -> int:
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"prediction_type": self.prediction_type} if self.is_contradicted else {}

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The noise schedule, ``(num_train_timesteps,)`` float32 on the base's device."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @cached_property
    def time_ids(self) -> Tensor:
        """The size conditioning of SDXL's UNet: a whole picture of the trained size, ``(6,)`` on the device."""
        original = target = (self.size_px, self.size_px)
        crop_top_left = (0, 0)
        return torch.tensor([*original, *crop_top_left, *target], dtype=self.dtype, device=self.device)

    def prepare_prompts(self, texts: Sequence[str]) -> Prompts:
        """Token ids, padded as the pipeline pads them."""
        tokenizers = [self.tokenizer] if self.tokenizer_2 is None else [self.tokenizer, self.tokenizer_2]
        ids = [
            tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
            for text in texts
            for tokenizer in tokenizers
        ]
        return Prompts(torch.tensor(ids, device=self.device).unflatten(0, (len(texts), len(tokenizers))))

    def encode_prompts(self, prompts: Prompts) -> PromptEmbeds:
        """The text encoders' outputs for prompts, computed as in diffusers' pipeline."""
        ids = prompts.token_ids
        if self.text_encoder_2 is None:
            return PromptEmbeds(self.text_encoder(ids[:, 0])[0])
        first, second = (
            encoder(part, output_hidden_states=True)
            for encoder, part in zip(self.text_encoders, ids.unbind(1), strict=True)
        )
        # SDXL was trained on the last but one layer of both.
        return PromptEmbeds(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds)

    def timesteps(self, positions: Tensor, max_timestep: int) -> Tensor:
        """All of them are alike likely."""
        num_timesteps = min(max_timestep, self.scheduler.config.num_train_timesteps)
        return (positions * num_timesteps).long().clamp(max=num_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(latents, noise, self.alphas_cumprod[timesteps])

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return prediction_target(latents, noise, self.alphas_cumprod[timesteps], self.prediction_type)

    def finished(self, noisy_latents: Tensor, noise_pred: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """By Salimans & Ho 2022, appendix D, for the velocity."""
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == EPSILON:
            return (noisy_latents - noise * noise_pred) / signal, noise_pred
        return signal * noisy_latents - noise * noise_pred, noise * noisy_latents + signal * noise_pred

    def encode_no_prompt(self, asked: PromptEmbeds) -> PromptEmbeds:
        """As the pipeline does it: SDXL's takes zeros."""
        pooled = asked.pooled_prompt_embeds
        if pooled is None or not self.zeros_for_no_prompt:
            return self.encode_prompts(self.prepare_prompts([""] * len(asked)))
        return PromptEmbeds(torch.zeros_like(asked.prompt_embeds), torch.zeros_like(pooled))

    def denoise(self, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        added = None
        if prompt_embeds.pooled_prompt_embeds is not None:
            time_ids = self.time_ids.expand(len(noisy_latents), -1)
            added = {"text_embeds": prompt_embeds.pooled_prompt_embeds, "time_ids": time_ids}
        noise_pred = self.unet(
            noisy_latents.to(self.dtype), timesteps, prompt_embeds.prompt_embeds, added_cond_kwargs=added
        ).sample
        return noise_pred.float()

    def pipeline(self) -> "Pipeline":
        import diffusers

        vae = self.vae.to(self.device)
        if self.dtype == torch.float16:  # which many of these VAEs overflow in, and draw black
            vae.type(torch.float32)
        parts = {"tokenizer": self.tokenizer, "scheduler": self.scheduler, "vae": vae}
        if self.tokenizer_2 is not None:
            parts |= {"tokenizer_2": self.tokenizer_2, "force_zeros_for_empty_prompt": self.zeros_for_no_prompt}
        options = get_family(self.family).pipeline_options
        pipeline = getattr(diffusers, self._pipeline_class)(**self.adapted, **parts, **options)
        pipeline.set_progress_bar_config(disable=True)
        self.vae.enable_slicing()  # which decodes one picture at a time: each takes gigabytes
        return pipeline

    def pipeline_inputs(
        self, texts: Sequence[str], guidance: float, negative: str = "", clip_skip: int = 1
    ) -> dict[str, Any]:
        inputs = {"prompt": list(texts), "guidance_scale": guidance}
        if negative:  # SDXL takes zeros for none
            inputs["negative_prompt"] = [negative] * len(texts)
        if clip_skip == 1:
            return inputs
        if self.text_encoder_2 is not None:
            raise ValueError(f"clip skip is {clip_skip}, and {self.name} always reads CLIP's last layer but one; leave "
                             f"it at 1")  # fmt: skip
        num_layers = self.text_encoder.config.num_hidden_layers
        if clip_skip > num_layers:
            raise ValueError(f"clip skip is {clip_skip}, and the text encoder of {self.name} has {num_layers} layers")
        # diffusers' own clip_skip looks for modules that transformers 5 has moved.
        return {
            "prompt_embeds": self._skipping(texts, clip_skip),
            "negative_prompt_embeds": self._skipping([negative] * len(texts), clip_skip),
            "guidance_scale": guidance,
        }

    def _skipping(self, texts: Sequence[str], clip_skip: int) -> Tensor:
        """The states of an earlier layer of CLIP, with its final norm, ``(n, tokens, width)``."""
        ids = self.prepare_prompts(texts).token_ids[:, 0]
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return model.final_layer_norm(states[-clip_skip])


def _as_weights(module: nn.Conv2d, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].to(module.weight.dtype),)


def _check_components(source: str, pipeline: "Pipeline") -> None:
    names = ("text_encoder", "text_encoder_2")
    text_encoders = [getattr(pipeline, name) for name in names if hasattr(pipeline, name)]
    read, given = pipeline.unet.config.cross_attention_dim, [encoder.config.hidden_size for encoder in text_encoders]
    if read != sum(given):
        raise ValueError(
            f"{source} has a UNet that reads prompts of width {read} and text encoders of width "
            f"{' + '.join(map(str, given))}; pass a plain SD 1.x, 2.x or SDXL base"
        )
    check_channels(source, pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels)
    check_all_loaded(source, pipeline.unet, *text_encoders, pipeline.vae)
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{source} comes with a {type(pipeline.scheduler).__name__}, which adds noise otherwise than Stable "
            f"Diffusion; pass a plain SD 1.x, 2.x or SDXL base"
        )
    stated = pipeline.scheduler.config.prediction_type
    if stated not in (EPSILON, V, None):
        raise ValueError(f"{source} predicts {stated!r}; expected '{EPSILON}' or '{V}'")
