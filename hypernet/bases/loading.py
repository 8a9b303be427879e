"""From a Hugging Face id, a diffusers folder or a single-file checkpoint to a base model: whole, or one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hypernet.bases.base import BaseModel
from hypernet.bases.checkpoints import check_checkpoint
from hypernet.bases.folders import TEXT_ENCODERS, check_folder, mend_text_encoder, pipeline_class
from hypernet.bases.stable_diffusion import PIPELINE_OPTIONS, StableDiffusion
from hypernet.devices import choose_device, choose_dtype
from hypernet.errors import first_sentence
from hypernet.quiet import quiet_loading
from hypernet.recipe import ATTENTIONS, DEFAULT_BASE
from lidb_peft.safe_read import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from hypernet.bases.stable_diffusion import Pipeline


def load_base(
    source: str = DEFAULT_BASE,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    compile: bool = False,
) -> BaseModel:
    """Load a frozen base model; weights are read from safetensors only and never unpickled.

    Args:
        attention: of the denoiser, ``sdpa`` (torch's own) or ``xformers``; ``auto`` is ``sdpa``.
        compile: compile the denoiser at its first use, by `torch.compile`, which takes minutes.

    Raises:
        ValueError: the source is not a Stable Diffusion 1.x, 2.x or XL, a pickled checkpoint or damaged; or xformers is
            asked for and not to be had.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; choose {', '.join(ATTENTIONS)}")
    torch_device = choose_device(device)
    base = StableDiffusion.from_pipeline(source, load_pipeline(source, choose_dtype(precision, torch_device)))
    for component in (*base.adapted.values(), base.vae):
        component.requires_grad_(False).eval().to(torch_device)
    _check_finite(source, base)
    if attention == "xformers":
        _use_xformers(base.denoiser)
    if compile:
        base.denoiser.compile()
    return base


def _check_finite(source: str, base: BaseModel) -> None:
    """Find a damaged base before a fit on it does, which would blame the learning rate."""
    for component, model in {**base.adapted, "vae": base.vae}.items():
        bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        if bad:
            raise ValueError(f"{source} holds NaN or infinity in {len(bad)} weights of its {component}, {bad[0]} for "
                             f"one: the base model is damaged; get it again")  # fmt: skip


def _use_xformers(denoiser: nn.Module) -> None:
    try:
        if find_spec("xformers") is None:
            raise ModuleNotFoundError("it is not installed")
        denoiser.enable_xformers_memory_efficient_attention()
    except Exception as error:  # built for another torch, no CUDA, or a card that it does not know
        raise ValueError(
            f"attention xformers cannot be had ({first_sentence(error)}); pip install 'lidb-peft[cuda]' on a machine "
            f"with CUDA, or choose sdpa"
        ) from error


def load_pipeline(source: str, dtype: torch.dtype) -> "Pipeline":
    """Load a Stable Diffusion 1.x, 2.x or XL on the CPU; weights are read from safetensors only and never unpickled.

    Raises:
        ValueError: the source is something else, or damaged, or a pickled checkpoint.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    path = Path(source)
    with quiet_loading():
        if path.is_file():
            return _load_single_file(path, dtype)
        if path.is_dir():
            return _load_folder(path, dtype)
        return _load_from_hub(source, dtype)


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
