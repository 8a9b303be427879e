"""From a Hugging Face id, a diffusers folder or a single-file checkpoint to a base model: whole, or one sentence."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hypernet.bases.base import BaseModel
from hypernet.bases.checkpoints import check_channels, check_checkpoint, marker
from hypernet.bases.config import BaseConfig
from hypernet.bases.flux import Flux
from hypernet.bases.folders import check_folder, mend_text_encoder, pipeline_family
from hypernet.bases.stable_diffusion import StableDiffusion
from hypernet.bundles import BUNDLES, base_source
from hypernet.devices import choose_device, choose_dtype, describe_choice, limit_memory, tune_device
from hypernet.errors import first_sentence
from hypernet.hub import split_revision
from hypernet.quiet import quiet_loading
from hypernet.recipe import ATTENTIONS, DEFAULT_BASE
from lidb_peft.families import FAMILIES, Family
from lidb_peft.safe_read import PICKLE_SUFFIXES, read_header

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CLASSES: tuple[type[BaseModel], ...] = (StableDiffusion, Flux)
"""Of base models; a new one is listed here."""

Base = BaseModel | BaseConfig | str | Path
"""A loaded base model, or which one to load: `load_base` takes it with all defaults if it is but a name."""

_log = logging.getLogger(__name__)


def load_base(
    source: str | Path = DEFAULT_BASE,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    compile: bool = False,
    components: str | Path | None = None,
    train_text_encoder: bool = False,
    quantize: str | None = None,
    guidance_scale: float | None = None,
    revision: str | None = None,
    max_vram: int | None = None,
) -> BaseModel:
    """Load a frozen base model; weights are read from safetensors only and never unpickled.

    Args:
        source: a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or ``testbed``, the bundled miniature.
        attention: of the denoiser, ``sdpa`` (torch's own) or ``xformers``; ``auto`` is ``sdpa``.
        compile: compile the denoiser at its first use, by `torch.compile`, which takes minutes.
        components: a diffusers folder with the other components, where ``source`` is a file of a transformer alone.
        train_text_encoder: adapt CLIP too, where a family does not anyway: FLUX.1.
        quantize: hold the transformer's blocks in ``nf4`` or ``int8``: FLUX.1.
        guidance_scale: what a distilled model is told while it is fitted, 1 if not given: FLUX.1 dev.
        revision: branch, tag or commit of a base on the hub.
        max_vram: how many bytes torch may take of the CUDA device.

    Raises:
        ValueError: the source is of no known family, a pickled checkpoint or damaged; an option is none of that
            family's; or xformers or bitsandbytes is asked for and not to be had.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; choose {', '.join(ATTENTIONS)}")
    torch_device = choose_device(device)
    if max_vram is not None:
        limit_memory(torch_device, max_vram)
    name = str(source)
    if revision is not None and (name in BUNDLES or Path(name).exists()):
        raise ValueError(f"--revision is for a base on the Hugging Face hub, and {name} is here; leave it out")
    source = base_source(name) if revision is None else f"{name}@{revision}"
    tune_device(torch_device)
    if compile:
        _check_compiler(torch_device)
    given = {"train_text_encoder": train_text_encoder, "quantize": quantize, "guidance_scale": guidance_scale}
    options = {name: value for name, value in given.items() if value not in (None, False)}
    family, pipeline = load_pipeline(source, choose_dtype(precision, torch_device), options, components)
    base = class_of(family).from_pipeline(source, pipeline, torch_device, **options)
    _check_finite(source, base)
    if attention == "xformers":
        _use_xformers(base.denoiser)
    if compile:
        base.denoiser.compile()
    _log.info("base %s on %s", name, describe_choice(base.device, base.dtype))
    return base


def as_base(base: Base, device: str | None = None) -> BaseModel:
    """A base that is loaded already, or `load_base` of what is named, onto ``device`` if that is given."""
    if isinstance(base, BaseModel):
        return base
    config = base if isinstance(base, BaseConfig) else BaseConfig(str(base))
    options = asdict(config if device is None else replace(config, device=device))
    return load_base(options.pop("base"), **options)


def base_name(base: Base) -> str:
    """What a base is called, loaded or not."""
    return base.name if isinstance(base, BaseModel) else base.base if isinstance(base, BaseConfig) else str(base)


def base_inputs(base: Base) -> list[str]:
    """What a base is read from, for `lidb_peft.outputs`: files and folders among it are not written over."""
    return [base_name(base), *([base.components] if isinstance(base, BaseConfig) and base.components else [])]


def _check_finite(source: str, base: BaseModel) -> None:
    """Find a damaged base before a fit on it does, which would blame the learning rate."""
    for component, model in {**base.adapted, "vae": base.vae}.items():
        bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        if bad:
            raise ValueError(f"{source} holds NaN or infinity in {len(bad)} weights of its {component}, {bad[0]} for "
                             f"one: the base model is damaged; get it again")  # fmt: skip


def class_of(family: Family) -> type[BaseModel]:
    """The class that bases of a family are loaded as."""
    return next(kind for kind in CLASSES if family.name in kind.families)


def check_options(source: str, family: Family, options: Collection[str]) -> None:
    """Raise ValueError if an option is none of this family's, before gigabytes are loaded."""
    for name in options:
        if name not in class_of(family).options:
            owners = [FAMILIES[owner].title for kind in CLASSES if name in kind.options for owner in kind.families]
            raise ValueError(
                f"--{name.replace('_', '-')} is for {' and '.join(owners)}, and {source} is {family.title}; leave it "
                f"out"
            )


def _check_compiler(device: torch.device) -> None:
    """Compile something small, before minutes go into what cannot be compiled.

    Raises:
        ValueError: it cannot be, for want of a C++ compiler or of Triton.
    """
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton or the compiler itself
        needed = "Triton (on Windows: pip install triton-windows)" if device.type == "cuda" else "a C++ compiler"
        raise ValueError(
            f"--compile cannot be had on {device} ({first_sentence(error)}); install {needed}, or leave --compile out"
        ) from error


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


def load_pipeline(
    source: str, dtype: torch.dtype, options: Collection[str] = (), components: str | Path | None = None
) -> "tuple[Family, DiffusionPipeline]":
    """Load a base's pipeline on the CPU; weights are read from safetensors only and never unpickled.

    Args:
        options: names of those that are given, see `check_options`.

    Returns:
        A family that is loaded alike, and the pipeline.

    Raises:
        ValueError: the source is something else, or damaged, or a pickled checkpoint.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    path = Path(source)
    with quiet_loading():
        if path.is_file():
            return _load_single_file(path, dtype, options, components)
        if components is not None:
            raise ValueError(f"{source} is no file of a transformer alone, which --components goes with; leave it out")
        if path.is_dir():
            return _load_folder(path, dtype, options)
        return _load_from_hub(source, dtype, options)


@contextmanager
def _loading(source: str | Path, family: Family, *failures: type[Exception]) -> Iterator[None]:
    """Say in a sentence what a library finds wrong with a base, ``failures`` included."""
    title = class_of(family).title
    try:
        yield
    except (ValueError, RuntimeError, *failures) as error:
        raise ValueError(f"{source} cannot be loaded as a {title}: {first_sentence(error)}") from error


def _load_folder(folder: Path, dtype: torch.dtype, options: Collection[str]) -> "tuple[Family, DiffusionPipeline]":
    family, variant = check_folder(folder)
    check_options(str(folder), family, options)
    return family, _open_folder(folder, family, variant, dtype)


def _open_folder(
    folder: Path, family: Family, variant: str | None, dtype: torch.dtype, **given: nn.Module
) -> "DiffusionPipeline":
    with _loading(folder, family, OSError):  # configs that do not fit the weights, or each other
        pipeline = _load_pretrained(str(folder), family, dtype, variant=variant, **given)
    for component in family.text_encoders:
        mend_text_encoder(folder / component.name, variant, getattr(pipeline, component.name))
    return pipeline


def _load_pretrained(source: str, family: Family, dtype: torch.dtype, **options) -> "DiffusionPipeline":
    import diffusers

    return getattr(diffusers, family.pipelines[0]).from_pretrained(
        source, use_safetensors=True, **family.pipeline_options, **_dtype_argument(dtype), **options
    )


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """diffusers called this argument ``torch_dtype`` until it deprecated that."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


def _load_from_hub(source: str, dtype: torch.dtype, options: Collection[str]):
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(source).suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        raise FileNotFoundError(f"{source} does not exist; check the path of the checkpoint")
    try:
        name, revision = split_revision(source)
        pinned = {} if revision is None else {"revision": revision}
        validate_repo_id(name)
        family = pipeline_family(source, _load_index(name, **pinned))
        check_options(source, family, options)
        with _loading(source, family):
            return family, _load_pretrained(name, family, dtype, **pinned)
    except (HFValidationError, OSError) as error:
        is_telling = isinstance(error, HfHubHTTPError) or getattr(error, "errno", None)  # gated, disk full
        reason = f" ({first_sentence(error)})" if is_telling else ""
        raise FileNotFoundError(
            f"the base model {source!r} is not a folder or file here and could not be had from the Hugging Face hub; "
            f"connect to the internet and try again, or pass --base with a diffusers folder or a .safetensors "
            f"checkpoint that you have, or pass --base testbed for the miniature that ships with this package{reason}"
        ) from error


def _load_index(source: str, **options: str) -> dict[str, Any]:
    """A hub's ``model_index.json``: what it is, before gigabytes are downloaded."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.load_config(source, **options)


def _load_single_file(path: Path, dtype: torch.dtype, options: Collection[str], components: str | Path | None):
    """A whole model, or a denoiser beside the folder of its other components."""
    family = check_checkpoint(path)
    check_options(str(path), family, options)
    if family.checkpoint_parts:
        if components is not None:
            raise ValueError(f"{path} is a whole model; leave --components out")
        return family, _load_whole_file(path, family, dtype)
    name = family.denoiser.name
    if components is None:
        others = ", ".join(f"{component.name}/" for component in family.text_encoders)
        raise ValueError(
            f"{path} holds the {name} of {family.title} alone; pass --components with a diffusers folder that has the "
            f"others: vae/, {others}, tokenizers, scheduler/ and {name}/config.json"
        )
    folder = Path(components)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name a diffusers folder of {family.title}")
    found, variant = check_folder(folder, without=(name,))
    if found is not family:
        raise ValueError(
            f"{folder} holds a {found.title}, and {path} a {name} of {family.title}; name a folder of that"
        )
    with _loading(path, family):
        denoiser = class_of(family).load_denoiser(path, folder / name, dtype)
    return family, _open_folder(folder, family, variant, dtype, **{name: denoiser})


def _load_whole_file(path: Path, family: Family, dtype: torch.dtype) -> "DiffusionPipeline":
    """A checkpoint has neither tokenizers nor configuration: diffusers takes them from the hub, or from its cache."""
    import diffusers

    tensors = read_header(path).tensors
    check_channels(str(path), tensors[marker(family, tensors)].shape[1], family.latent_channels)
    try:
        with _loading(path, family):
            return getattr(diffusers, family.pipelines[0]).from_single_file(
                str(path), **family.pipeline_options, **_dtype_argument(dtype)
            )
    except OSError as error:
        raise FileNotFoundError(
            f"{path} holds weights only, and the tokenizer and configuration that go with it (3 MB) could not be had "
            f"from the Hugging Face hub; connect to the internet once, or pass --base with a diffusers folder "
            f"({first_sentence(error)})"
        ) from error
