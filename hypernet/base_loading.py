"""From a Hugging Face id, a folder or a checkpoint to diffusers' pipeline: whole, of a kind we know, or a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hypernet.base_files import (
    TEXT_ENCODERS,
    check_channels,
    check_checkpoint,
    check_folder,
    mend_text_encoder,
    pipeline_class,
)
from hypernet.errors import first_sentence
from lidb_peft.safe_read import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


# What each class is made with beside its parts: nothing that would censor or mark a picture.
PIPELINE_OPTIONS = {
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}


def load_pipeline(source: str, dtype: torch.dtype) -> "Pipeline":
    """Load a Stable Diffusion 1.x, 2.x or XL on the CPU; weights are read from safetensors only and never unpickled.

    Raises:
        ValueError: the source is something else, or damaged, or a pickled checkpoint.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    path = Path(source)
    if path.is_file():
        pipeline = _load_single_file(path, dtype)
    elif path.is_dir():
        pipeline = _load_folder(path, dtype)
    else:
        pipeline = _load_from_hub(source, dtype)
    _check_architecture(source, pipeline)
    return pipeline


@contextmanager
def _loading(source: str | Path, *failures: type[Exception]) -> Iterator[None]:
    """Say in a sentence what a library finds wrong with a base, ``failures`` included."""
    try:
        yield
    except (ValueError, RuntimeError, *failures) as error:
        raise ValueError(f"{source} cannot be loaded as a Stable Diffusion: {first_sentence(error)}") from error


def _load_folder(folder: Path, dtype: torch.dtype) -> "Pipeline":
    kind, variant = check_folder(folder)
    with _loading(folder, OSError):  # configs that do not fit the weights, or each other
        pipeline = _load_pretrained(str(folder), kind, dtype, variant=variant)
    for name in TEXT_ENCODERS[kind]:
        mend_text_encoder(folder / name, variant, getattr(pipeline, name))
    return pipeline


def _load_pretrained(source: str, kind: str, dtype: torch.dtype, **options) -> "Pipeline":
    import diffusers

    return getattr(diffusers, kind).from_pretrained(
        source, use_safetensors=True, **PIPELINE_OPTIONS[kind], **_dtype_argument(dtype), **options
    )


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """diffusers called this argument ``torch_dtype`` until it deprecated that."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


def _load_from_hub(source: str, dtype: torch.dtype) -> "Pipeline":
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(source).suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        raise FileNotFoundError(f"{source} does not exist; check the path of the checkpoint")
    try:
        validate_repo_id(source)
        with _loading(source):
            return _load_pretrained(source, pipeline_class(source, _load_index(source)), dtype)
    except (HFValidationError, OSError) as error:
        is_telling = isinstance(error, HfHubHTTPError) or getattr(error, "errno", None)  # gated, disk full
        reason = f" ({first_sentence(error)})" if is_telling else ""
        raise FileNotFoundError(
            f"the base model {source!r} is not a folder or file here and could not be had from the Hugging Face hub; "
            f"connect to the internet and try again, or pass --base with a diffusers folder or a .safetensors "
            f"checkpoint that you have, or pass --base testbed for the miniature that ships with this package{reason}"
        ) from error


def _load_index(source: str) -> dict[str, Any]:
    """A hub's ``model_index.json``: what it is, before gigabytes are downloaded."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.load_config(source)


def _load_single_file(path: Path, dtype: torch.dtype) -> "Pipeline":
    """A checkpoint has neither tokenizers nor configuration: diffusers takes them from the hub, or from its cache."""
    import diffusers

    kind = check_checkpoint(path)
    try:
        with _loading(path):
            return getattr(diffusers, kind).from_single_file(
                str(path), **PIPELINE_OPTIONS[kind], **_dtype_argument(dtype)
            )
    except OSError as error:
        raise FileNotFoundError(
            f"{path} holds weights only, and the tokenizer and configuration that go with it (3 MB) could not be had "
            f"from the Hugging Face hub; connect to the internet once, or pass --base with a diffusers folder "
            f"({first_sentence(error)})"
        ) from error


def _check_architecture(source: str, pipeline: "Pipeline") -> None:
    text_encoders = [getattr(pipeline, name) for name in TEXT_ENCODERS[type(pipeline).__name__]]
    read, given = pipeline.unet.config.cross_attention_dim, [encoder.config.hidden_size for encoder in text_encoders]
    if read != sum(given):
        raise ValueError(
            f"{source} has a UNet that reads prompts of width {read} and text encoders of width "
            f"{' + '.join(map(str, given))}; pass a plain SD 1.x, 2.x or SDXL base"
        )
    check_channels(source, pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels)
    for part in (pipeline.unet, *text_encoders, pipeline.vae):
        missing = [name for name, parameter in part.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{source} lacks {len(missing)} weights of its {type(part).__name__}, {missing[0]} for "
                             f"one; download the base model again")  # fmt: skip
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{source} predicts {prediction!r}; expected 'epsilon' or 'v_prediction'")
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{source} comes with a {type(pipeline.scheduler).__name__}, which adds noise otherwise than Stable "
            f"Diffusion; pass a plain SD 1.x, 2.x or SDXL base"
        )
