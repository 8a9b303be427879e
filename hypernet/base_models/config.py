"""Which base model to load and how: a plain config, light to import, so that `hdb --help` shows its defaults."""

from dataclasses import dataclass

from hypernet.recipe import ATTENTIONS, DEFAULT_BASE, PRECISIONS, PREDICTIONS, QUANTIZATIONS, setting


@dataclass(frozen=True)
class BaseConfig:
    """Which base model to load and how; see `hypernet.base_models.loading.load_base`.

    Attributes:
        base: base model, a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or ``testbed``, the bundled
            miniature.
        device: device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: the base model's dtype: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        attention: attention backend of the denoiser: ``sdpa``, which is torch's, or ``xformers``; ``auto`` is
            ``sdpa``.
        compile: compile the denoiser on first use, which takes minutes and pays off only for thousands of people.
        components: diffusers folder with the components that the base file lacks, for a file that holds only
            a transformer.
        prediction: prediction type of a Stable Diffusion model; ``auto`` reads it from the base's config or metadata,
            or measures it if they do not say.
        quantize: quantize FLUX.1's transformer to ``nf4`` or ``int8``, which requires bitsandbytes.
        train_text_encoder: adapt FLUX.1's CLIP too; Stable Diffusion's is always adapted.
        guidance_scale: guidance input of FLUX.1 dev, a guidance-distilled model, while fitting; default 1.
        revision: branch, tag or commit of a base on the Hugging Face hub; default main.
        max_vram: limit on the GPU memory that torch may use, such as 4GB; CUDA's own overhead comes on top. In bytes.
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
