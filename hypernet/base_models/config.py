"""Which base model, and how it is loaded: a plain config, light to import, so that `hdb --help` shows its defaults."""

from dataclasses import dataclass

from hypernet.recipe import ATTENTIONS, DEFAULT_BASE, PRECISIONS, PREDICTIONS, QUANTIZATIONS, setting


@dataclass(frozen=True)
class BaseConfig:
    """Which base model, and how it is loaded; see `hypernet.base_models.loading.load_base`.

    Attributes:
        base: base model, a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or ``testbed``, the bundled
            miniature.
        device: where to compute: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: the base model's dtype: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        attention: attention backend of the denoiser, ``sdpa``, which is torch's own, or ``xformers``; ``auto`` is
            ``sdpa``.
        compile: compile the denoiser at its first use, which takes minutes and pays for thousands of people.
        components: where the base is a file without all components, such as a transformer alone, a diffusers folder
            with the others.
        prediction: what a Stable Diffusion predicts; ``auto`` takes what the base says of itself, and measures it where
            it says nothing.
        quantize: hold FLUX.1's transformer in ``nf4`` or ``int8``, by bitsandbytes.
        train_text_encoder: adapt FLUX.1's CLIP too; Stable Diffusion's always is.
        guidance_scale: what FLUX.1 dev, which is distilled from guidance, is told while it is fitted, 1 if not given.
        revision: branch, tag or commit of a base on the Hugging Face hub, by default main.
        max_vram: limit the GPU memory that torch may use, e.g. 4GB; what CUDA itself needs comes on top. In bytes.
    """

    base: str = DEFAULT_BASE
    device: str = "auto"
    precision: str = setting("auto", PRECISIONS)
    attention: str = setting("auto", ATTENTIONS)
    compile: bool = False
    components: str | None = None
    prediction: str = setting("auto", PREDICTIONS)
    quantize: str | None = setting(None, QUANTIZATIONS)
    train_text_encoder: bool = False
    guidance_scale: float | None = None
    revision: str | None = None
    max_vram: int | None = None
