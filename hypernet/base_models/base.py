"""The interface of a base model, used by fitting, training, prompt preservation and sampling.

A family of base models is one subclass of `BaseModel`; nothing outside of this folder knows which one it holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hypernet.base_models.prediction import Prediction
from hypernet.devices import release_memory
from hypernet.errors import is_out_of_memory
from lidb_peft import base_fingerprint
from lidb_peft.families import Family, get_family

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from typing_extensions import Self


@dataclass(frozen=True)
class _Batch:
    """Tensors of n samples each, ``(n, ...)``; None for what a base does not have."""

    @property
    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def __len__(self) -> int:
        return next(len(tensor) for tensor in self.tensors if tensor is not None)

    def rows(self, index: Tensor) -> "Self":
        """The samples at ``index`` ``(m,)``, in its order."""
        return type(self)(*(None if tensor is None else tensor[index] for tensor in self.tensors))

    @classmethod
    def concatenate(cls, parts: "Sequence[Self]") -> "Self":
        """The samples of all parts, one part after the other; all are of one base."""
        columns = zip(*(part.tensors for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Prompts(_Batch):
    """n prompts, as far as they can be read before any adapted weights come in.

    Attributes:
        token_ids: for the E text encoders that `BaseModel.encode_prompts` runs, ``(n, E, tokens)``.
        prompt_embeds: the states of one that is never adapted, ``(n, tokens, width)``; None if there is none.
    """

    token_ids: Tensor
    prompt_embeds: Tensor | None = None


@dataclass(frozen=True)
class PromptEmbeds(_Batch):
    """Prompt conditioning: the denoiser's inputs for n prompts.

    Attributes:
        prompt_embeds: the text encoders' states, ``(n, tokens, width)``.
        pooled_prompt_embeds: a summary of each prompt, ``(n, width)``; None where the base takes none.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None


@dataclass
class BaseModel(ABC):
    """A frozen base model, its components as diffusers and transformers classes.

    Attributes:
        name: the id, folder or file it came from.
    """

    name: str
    vae: "AutoencoderKL"
    scheduler: "SchedulerMixin"

    title: ClassVar[str]
    """The name of such a model in messages."""
    families: ClassVar[tuple[str, ...]]
    """Names of the families in `lidb_peft.families` that are loaded as this class."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Options of `load_base` that only some families have, of those that this class takes."""
    guidance: ClassVar[float]
    """The default guidance scale for drawing pictures."""

    @classmethod
    @abstractmethod
    def from_pipeline(cls, name: str, pipeline: "DiffusionPipeline", device: torch.device, **options: Any) -> "Self":
        """Take over the components of diffusers' pipeline, frozen, for use on ``device``; raises as `load_base`."""

    @classmethod
    def parts_of_file(cls, path: Path, family: Family) -> list[str]:
        """Names of the components that a single file holds, where a family has files of whole models."""
        raise NotImplementedError

    @classmethod
    def load_file(cls, path: Path, family: Family, dtype: torch.dtype) -> tuple[dict[str, Any], Prediction | None]:
        """Load those components, with all that goes with them, and what the file says that it predicts.

        Raises:
            ValueError: it lacks weights, or has others than the family's.
        """
        raise NotImplementedError

    @classmethod
    def load_denoiser(cls, path: Path, config_folder: Path, dtype: torch.dtype) -> nn.Module:
        """Load a file of a denoiser alone, whose config is in ``config_folder``, where a family has such files."""
        raise NotImplementedError

    @property
    def prediction_reason(self) -> str:
        """How the prediction type was determined, for messages; "" if the family has only one."""
        return ""

    @property
    def family(self) -> str:
        """The name of its family in `lidb_peft.families`."""
        return self.families[0]

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The model that predicts from noisy latents, a UNet or a transformer."""

    @property
    @abstractmethod
    def adapted(self) -> dict[str, nn.Module]:
        """The models whose layers can be adapted, by component name, the denoiser first."""

    def models_to_adapt(self, adapt: str) -> dict[str, nn.Module]:
        """Those of `adapted` that a setting ``adapt`` means, ``denoiser`` or ``all``.

        A text encoder that its family leaves as it is unless asked, FLUX.1's CLIP, was asked for if it is there.
        """
        if adapt == "all":
            return self.adapted
        family = get_family(self.family)
        asked_for = {component.name for component in family.components if not component.is_adapted}
        return {name: model for name, model in self.adapted.items() if name in asked_for | {family.denoiser.name}}

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the denoiser predicts, as diffusers' schedulers call it."""

    @property
    @abstractmethod
    def size_px(self) -> int:
        """The side of the square pictures it was trained on."""

    @abstractmethod
    def prepare_prompts(self, texts: Sequence[str]) -> Prompts:
        """Read prompts as far as no adapted weights are needed for it; on the base's device."""

    def prepare_each_once(self, texts: Sequence[str]) -> tuple[Prompts, Tensor]:
        """The different ones of ``texts``, prepared, and where each of the n is among them, ``(n,)``, on the device."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        return self.prepare_prompts(list(places)), torch.tensor([places[text] for text in texts], device=self.device)

    @abstractmethod
    def encode_prompts(self, prompts: Prompts) -> PromptEmbeds:
        """The conditioning for n prompts under the applied weights; differentiable."""

    @abstractmethod
    def timesteps(self, positions: Tensor, max_timestep: int) -> Tensor:
        """The timesteps ``(n,)`` to train at: the quantiles ``positions`` in [0, 1) of those below ``max_timestep``."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents ``(n, c, h, w)`` at ``timesteps`` ``(n,)``."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's target for the result of `add_noise`, ``(n, c, h, w)``."""

    @abstractmethod
    def finished(self, noisy_latents: Tensor, noise_pred: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the noise that `denoise`'s prediction implies, ``(n, c, h, w)`` each.

        It undoes `add_noise` if the prediction is the `target`.
        """

    @abstractmethod
    def denoise(self, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        """The denoiser's prediction for ``(n, c, h, w)`` at ``timesteps`` ``(n,)``, same shape, float32."""

    @abstractmethod
    def encode_no_prompt(self, asked: PromptEmbeds) -> PromptEmbeds | None:
        """The conditioning without a prompt for each of ``asked``; None if the base is distilled from guidance."""

    @abstractmethod
    def pipeline(self) -> "DiffusionPipeline":
        """The same components, not copies, as diffusers' pipeline that draws pictures."""

    @abstractmethod
    def pipeline_inputs(
        self, texts: Sequence[str], guidance: float, negative: str = "", clip_skip: int = 1
    ) -> dict[str, Any]:
        """The arguments for `pipeline` to draw prompts under the applied weights.

        Args:
            negative: negative prompt; "" is none.
            clip_skip: CLIP layer to use, counted from the last, which is 1, as in Automatic1111.

        Raises:
            ValueError: the base has no negative prompts, or does not let CLIP's layer be chosen.
        """

    def settle(self) -> None:  # noqa: B027 - most bases are there from the start
        """Move everything that a step needs to the device, if it is not there yet."""

    @property
    def settings(self) -> dict[str, Any]:
        """The loading options that fits depend on, for comparison with a target store."""
        return {}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device  # its own property goes through all of its modules

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one picture's latents, ``(c, h, w)``."""
        side = self.size_px // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side

    @cached_property
    def vae_fingerprint(self) -> str:
        """Tells the VAE's encoder by some of its weights, see `lidb_peft.base_fingerprint`."""
        return base_fingerprint({"vae": self.vae.encoder})

    @torch.no_grad()
    def encode_photos(self, pixels: Tensor, release: bool = True) -> Tensor:
        """The VAE's moments of photos, encoded once and resampled at each step: ``(photos, 2 * c, h, w)`` float32.

        The VAE is moved to the base's device for this. It runs in float32: SD1.5's overflows in float16.

        Args:
            pixels: ``(photos, 3, size, size)`` in [-1, 1].
            release: call `release_vae` at the end; False leaves the VAE there for the next photos.
        """
        try:
            moments, is_full = self._encode(pixels, self.device), False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            is_full = True
        if is_full:  # SDXL's VAE, beside the rest, takes more than a step of finetuning
            moments = self._encode_alone(pixels)
        if release:
            self.release_vae()
        return moments

    def _encode(self, pixels: Tensor, device: torch.device) -> Tensor:
        vae = self.vae.to(device).type(torch.float32)  # at a cast by to() diffusers logs a warning
        # One at a time: a batch of 512 px takes gigabytes.
        return torch.cat([vae.encode(photo[None].to(device)).latent_dist.parameters for photo in pixels])

    def _encode_alone(self, pixels: Tensor) -> Tensor:
        """Encode photos while all other models are on the CPU."""
        device = self.device
        for model in self.adapted.values():
            model.to("cpu")
        release_memory(device)
        try:
            moments = self._encode(pixels, device)
            self.release_vae()
        finally:
            for model in self.adapted.values():
                model.to(device)
        return moments

    def release_vae(self) -> None:
        """Move the VAE to the CPU, so that it holds no memory while fitting, in the base's dtype, to draw with."""
        self.vae.type(self.dtype).to("cpu")

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents ``(n, c, h, w)`` from moments ``(n, 2 * c, h, w)``, scaled as the denoiser takes them."""
        return sample_moments(moments, noise) * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures ``(n, 3, size, size)``, about in [-1, 1], of latents `sample_latents` scales; differentiable.

        The VAE is moved to the base's device for this, in float32; `release_vae` takes it away.
        """
        vae = self.vae.to(self.device).type(torch.float32)
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        slices = vae.use_slicing
        vae.use_slicing = False  # who has drawn before would change the rounding, and so a fit that is resumed
        try:
            return vae.decode(latents).sample
        finally:
            vae.use_slicing = slices

    @contextmanager
    def checkpointed(self, enabled: bool = True) -> Iterator[None]:
        """Gradient checkpointing for a block; diffusers and transformers recompute in training mode only.

        The bases have no dropout, so training mode changes nothing else.
        """
        if not enabled:
            yield
            return
        models: Iterable[Any] = self.adapted.values()  # whose methods torch's Module does not name
        for model in models:
            enable_checkpointing(model)
            model.train()
        try:
            yield
        finally:
            for model in models:
                if hasattr(model, "disable_gradient_checkpointing"):
                    model.disable_gradient_checkpointing()
                else:
                    _transformers_method(model, "checkpointing_disable")()
                model.eval()


def check_all_loaded(source: str, *components: nn.Module) -> None:
    """Raise ValueError if a weight was not in the files: the libraries leave it on the meta device."""
    for component in components:
        missing = [name for name, parameter in component.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{source} lacks {len(missing)} weights of its {type(component).__name__}, {missing[0]} "
                             f"for one; download the base model again")  # fmt: skip


def enable_checkpointing(model: Any) -> None:
    """Turn gradient checkpointing on in a model of diffusers or transformers, for its training mode."""
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers'
        model.enable_gradient_checkpointing()
    else:
        _transformers_method(model, "checkpointing_enable")({"use_reentrant": False})


def _transformers_method(model: nn.Module, name: str) -> Callable:
    """transformers renamed ``gradient_checkpointing_...`` to ``activation_checkpointing_...``, and warns of the old."""
    return getattr(model, f"activation_{name}", None) or getattr(model, f"gradient_{name}")


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw latents ``(n, c, h, w)`` from a VAE's moments ``(n, 2 * c, h, w)`` with standard normal ``noise``."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
