"""From a Hugging Face id, a diffusers folder or a single-file checkpoint to a base model: whole, or one sentence."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from hypernet.base_models.base import BaseModel
from hypernet.base_models.checkpoints import check_checkpoint
from hypernet.base_models.config import BaseConfig
from hypernet.base_models.flux import Flux
from hypernet.base_models.folders import check_folder, mend_text_encoder
from hypernet.base_models.from_hub import download_base, unavailable
from hypernet.base_models.prediction import NAMES, Prediction, short_name
from hypernet.base_models.stable_diffusion import StableDiffusion
from hypernet.bundles import BUNDLES, base_source
from hypernet.devices import choose_device, choose_dtype, describe_choice, limit_memory, tune_device
from hypernet.errors import first_sentence, is_out_of_memory
from hypernet.quiet import quiet_libraries
from hypernet.recipe import ATTENTIONS, DEFAULT_BASE, PREDICTIONS
from lidb_peft.families import FAMILIES, Family
from lidb_peft.safe_read import PICKLE_SUFFIXES

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
    prediction: str = "auto",
) -> BaseModel:
    """Load a frozen base model; weights are read from safetensors only and never unpickled.

    Args:
        source: a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or ``testbed``, the bundled miniature.
        attention: attention backend of the denoiser, ``sdpa`` (torch's) or ``xformers``; ``auto`` is ``sdpa``.
        compile: compile the denoiser on first use with `torch.compile`, which takes minutes.
        components: diffusers folder with the components that ``source`` lacks, if that is a file.
        train_text_encoder: adapt CLIP too, for families that do not by default: FLUX.1.
        quantize: quantize the transformer's blocks to ``nf4`` or ``int8``: FLUX.1.
        guidance_scale: guidance input of a guidance-distilled model while fitting, default 1: FLUX.1 dev.
        revision: branch, tag or commit of a base on the hub.
        max_vram: limit on torch's memory on the CUDA device, in bytes.
        prediction: prediction type of a Stable Diffusion, ``epsilon`` or ``v``; ``auto`` reads it from the base, or
            measures it if the base does not say; `BaseModel.prediction_reason` tells which.

    Raises:
        ValueError: the source is of no known family, a pickled checkpoint or damaged; the family does not support an
            option; or xformers or bitsandbytes is requested but not installed.
        FileNotFoundError: the source is neither local nor available from the hub.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; choose {', '.join(ATTENTIONS)}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}; choose {', '.join(PREDICTIONS)}")
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
    asked = None if prediction == "auto" else Prediction(NAMES[prediction], "as asked for")
    given = {"train_text_encoder": train_text_encoder, "quantize": quantize, "guidance_scale": guidance_scale,
             "prediction": asked}  # fmt: skip
    options = {name: value for name, value in given.items() if value not in (None, False)}
    family, pipeline, stated = load_pipeline(source, choose_dtype(precision, torch_device), options, components)
    if stated is not None:
        options = {"prediction": stated} | options
    base = class_of(family).from_pipeline(source, pipeline, torch_device, **options)
    _check_finite(source, base)
    if attention == "xformers":
        _use_xformers(base.denoiser)
    if compile:
        base.denoiser.compile()
    _log.info("base %s on %s%s", name, describe_choice(base.device, base.dtype), _describe_prediction(base))
    return base


def _describe_prediction(base: BaseModel) -> str:
    if not base.prediction_reason:
        return ""
    return f", predicts {short_name(base.prediction_type)}: {base.prediction_reason}"


def as_base(base: Base, device: str | None = None) -> BaseModel:
    """Return a loaded base as it is, or load it with `load_base`, onto ``device`` if given."""
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
            f"--compile is not available on {device} ({first_sentence(error)}); install {needed}, or drop --compile"
        ) from error


def _use_xformers(denoiser: nn.Module) -> None:
    try:
        if find_spec("xformers") is None:
            raise ModuleNotFoundError("it is not installed")
        cast(Any, denoiser).enable_xformers_memory_efficient_attention()
    except Exception as error:  # built for another torch, no CUDA, or a card that it does not know
        raise ValueError(
            f"attention xformers is not available ({first_sentence(error)}); pip install xformers on a machine with "
            f"CUDA, or choose sdpa"
        ) from error


def load_pipeline(
    source: str, dtype: torch.dtype, options: Collection[str] = (), components: str | Path | None = None
) -> "tuple[Family, DiffusionPipeline, Prediction | None]":
    """Load a base's pipeline on the CPU; weights are read from safetensors only and never unpickled.

    Args:
        options: names of those that are given, see `check_options`.

    Returns:
        A family that is loaded alike, the pipeline, and what a single file says that it predicts.

    Raises:
        ValueError: the source is something else, or damaged, or a pickled checkpoint.
        FileNotFoundError: the source is neither here nor can it be had from the hub.
    """
    path = Path(source)
    with quiet_libraries():
        if path.is_file():
            return _load_single_file(path, dtype, options, components)
        if components is not None:
            raise ValueError(f"{source} is not a file, which --components requires; leave it out")
        family, pipeline = (_load_folder if path.is_dir() else _load_from_hub)(source, dtype, options)
        return family, pipeline, None


@contextmanager
def _loading(source: str | Path, family: Family) -> Iterator[None]:
    """Say in a sentence what a library finds wrong with a base, in whatever way it does."""
    try:
        yield
    except Exception as error:  # of diffusers, transformers, tokenizers, safetensors, torch: no two agree on a type
        if is_out_of_memory(error):
            raise
        title = class_of(family).title
        raise ValueError(f"{source} cannot be loaded as a {title}: {first_sentence(error)}") from error


def _load_folder(source: str, dtype: torch.dtype, options: Collection[str]) -> "tuple[Family, DiffusionPipeline]":
    family, variant = check_folder(Path(source))
    check_options(source, family, options)
    return family, _open_folder(Path(source), family, variant, dtype)


def _open_folder(
    folder: Path, family: Family, variant: str | None, dtype: torch.dtype, **given: Any
) -> "DiffusionPipeline":
    """Load a folder's pipeline, but for the parts that are ``given``."""
    with _loading(folder, family):  # configs that do not fit the weights, or each other
        pipeline = _load_pretrained(str(folder), family, dtype, variant=variant, **given)
    for component in family.text_encoders:
        if component.name not in given:
            mend_text_encoder(folder / component.name, variant, getattr(pipeline, component.name))
    return pipeline


def _load_pretrained(source: str, family: Family, dtype: torch.dtype, **options: Any) -> "DiffusionPipeline":
    import diffusers

    return getattr(diffusers, family.pipelines[0]).from_pretrained(
        source, use_safetensors=True, **family.pipeline_options, **_dtype_argument(dtype), **options
    )


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """diffusers called this argument ``torch_dtype`` until it deprecated that."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


def _load_from_hub(source: str, dtype: torch.dtype, options: Collection[str]) -> "tuple[Family, DiffusionPipeline]":
    if Path(source).suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        raise FileNotFoundError(f"{source} does not exist; check the path of the checkpoint")
    folder, why_not = download_base(source, lambda family: check_options(source, family, options))
    try:
        family, variant = check_folder(folder)
    except ValueError as error:
        if not why_not:
            raise
        reason = f"{why_not} (the copy in the cache is not whole: {first_sentence(error)})"
        raise FileNotFoundError(unavailable(source, reason)) from error
    return family, _open_folder(folder, family, variant, dtype)


def _load_single_file(
    path: Path, dtype: torch.dtype, options: Collection[str], components: str | Path | None
) -> "tuple[Family, DiffusionPipeline, Prediction | None]":
    """A whole model, or what there is of one beside the folder of its other components."""
    family = check_checkpoint(path)
    check_options(str(path), family, options)
    if not family.vae_prefixes:
        return family, _load_denoiser_file(path, family, dtype, components), None
    titles = {component.name: component.title for component in family.components} | {"vae": "VAE"}
    with _loading(path, family):
        held = class_of(family).parts_of_file(path, family)
    lacking = [name for name in titles if name not in held]
    if lacking and components is None:
        what, folders = (" and no ".join(titles[name] for name in lacking), ", ".join(f"{name}/" for name in lacking))
        raise ValueError(f"{path} has no {what}; pass --components with a diffusers folder of {family.title} that has "
                         f"{folders}, or a whole checkpoint")  # fmt: skip
    if components is not None and not lacking:
        raise ValueError(f"{path} is a whole model; leave --components out")
    folder, variant = None, None
    if components is not None:
        tokenizers = [part.tokenizer for part in family.text_encoders if part.name in held]
        folder = Path(components)
        variant = _check_components(path, family, folder, (*held, *tokenizers, "scheduler"))
    with _loading(path, family):
        found, prediction = class_of(family).load_file(path, family, dtype)
    if folder is not None:
        return family, _open_folder(folder, family, variant, dtype, **found), prediction
    import diffusers

    return family, getattr(diffusers, family.pipelines[0])(**found, **family.pipeline_options), prediction


def _check_components(path: Path, family: Family, folder: Path, without: Collection[str]) -> str | None:
    """Check the folder with a file's other components; return the variant of its weights."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name a diffusers folder of {family.title}")
    found, variant = check_folder(folder, tuple(without))
    if found.pipelines != family.pipelines:
        raise ValueError(f"{folder} holds a {found.title}, and {path} is of {family.title}; name a folder of that")
    return variant


def _load_denoiser_file(
    path: Path, family: Family, dtype: torch.dtype, components: str | Path | None
) -> "DiffusionPipeline":
    """A denoiser beside the folder of its other components, which has its config too."""
    name = family.denoiser.name
    if components is None:
        others = ", ".join(f"{component.name}/" for component in family.text_encoders)
        raise ValueError(
            f"{path} holds the {name} of {family.title} alone; pass --components with a diffusers folder that has the "
            f"others: vae/, {others}, tokenizers, scheduler/ and {name}/config.json"
        )
    folder = Path(components)
    variant = _check_components(path, family, folder, (name,))
    config = folder / name / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{folder} has no {name}/config.json, which says how {path} is made; name a folder that has it"
        )
    with _loading(path, family):
        denoiser = class_of(family).load_denoiser(path, config.parent, dtype)
    return _open_folder(folder, family, variant, dtype, **{name: denoiser})
