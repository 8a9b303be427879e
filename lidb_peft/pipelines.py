"""LiDB adapters on diffusers pipelines: the UNet's part and the text encoders' loaded and saved together.

A saved adapter is a folder with one PEFT adapter for each component, in a subfolder of the component's name:
``unet/``, ``text_encoder/``, ``text_encoder_2/``. PEFT by itself loads each of them. A theta file holds all components.
"""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import CONFIG_NAME
from torch import Tensor, nn

from .config import LiDBConfig, LiDBPeftType
from .families import COMPONENTS, families_of_pipeline
from .files import atomic_folder, write_safetensors
from .layer import LiDBLayer
from .record import check_record, fingerprint_components, read_peft_config
from .safe_read import parse_json_object, printable, read_json_object, read_tensors
from .space import LiDBSpace
from .theta import load_theta

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# What diffusers' save_lora_adapter writes, and where in its metadata the config is.
_DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_SAVE_AGAIN = "save the adapter again, by lidb_peft.save_adapter"


def load_adapter(
    pipeline: "DiffusionPipeline", path: str | os.PathLike, adapter_name: str = "default", weight: float = 1.0
) -> None:
    """Add a saved LiDB adapter to a pipeline and activate it, beside the adapters that are active already.

    The pipeline's own ``set_adapters``, ``fuse_lora``, ``delete_adapters`` and so on then treat it as they treat a
    LoRA. If loading fails, no part of the adapter stays.

    Args:
        path: a theta file, or a folder as ``save_adapter`` writes it. A subfolder may also hold what diffusers'
            ``save_lora_adapter`` has written, if that diffusers was new enough to store the config with it.
        weight: strength relative to the adapter's own scale; ``set_adapters`` changes it.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is damaged or no LiDB adapter, the pipeline lacks one of its components or layers, or a component
            has an adapter of that name, has fused adapters, or is offloaded to the meta device.
    """
    path = Path(path)
    if path.is_dir():
        parts = {folder.name: _read_part(folder) for folder in _part_folders(path)}
        models = _components(pipeline, parts, path)
        configs = {name: config for name, (config, _) in parts.items()}
        with _added(models, configs, adapter_name, weight):
            for name, (_, tensors) in parts.items():
                set_peft_model_state_dict(models[name], tensors, adapter_name)
        return
    file = load_theta(path)
    names = fingerprint_components(file.base_fingerprint, str(path))
    if not names:  # the base was on the meta device; another list of layers is refused below
        families = families_of_pipeline(type(pipeline).__name__)
        others = {part.name for part in families[0].components if not part.is_adapted} if families else set()
        names = tuple(name for name in COMPONENTS if getattr(pipeline, name, None) is not None and name not in others)
    models = _components(pipeline, names, path)
    space = LiDBSpace(models, file.config)
    check_record(file.record, space, str(path))
    with _added(models, dict.fromkeys(models, file.config), adapter_name, weight):
        space.load_into_adapters(file.theta, adapter_name)


def save_adapter(pipeline: "DiffusionPipeline", folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write all components' parts of a LiDB adapter to a new folder, which appears whole or not at all.

    Raises:
        FileExistsError: ``folder`` exists.
        FileNotFoundError: the folder that it shall be in does not exist.
        ValueError: the pipeline has no LiDB adapter of that name.
    """
    configs = {name: getattr(model, "peft_config", {}) for name, model in pipeline.components.items()}
    chosen = {name: found[adapter_name] for name, found in configs.items() if adapter_name in found}
    if not chosen or not all(isinstance(config, LiDBConfig) for config in chosen.values()):
        names = sorted({n for found in configs.values() for n, c in found.items() if isinstance(c, LiDBConfig)})
        raise ValueError(f"the pipeline has no LiDB adapter called {adapter_name!r}; it has {names}")
    with atomic_folder(folder) as whole:
        for name, config in chosen.items():
            config.save_pretrained(str(whole / name))
            state = get_peft_model_state_dict(getattr(pipeline, name), adapter_name=adapter_name)
            tensors = {_PEFT_PREFIX + key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}
            write_safetensors(whole / name / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"})


def _part_folders(path: Path) -> list[Path]:
    """Return the subfolders that hold a component's part."""
    holders = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, _DIFFUSERS_WEIGHTS_NAME)
    folders = sorted(file.parent for file in path.glob("*/*") if file.name in holders)
    if folders:
        return list(dict.fromkeys(folders))
    if (path / CONFIG_NAME).is_file():
        raise ValueError(
            f"{path} holds one model's adapter; move it into a subfolder named for the model, such as unet/"
        )
    raise ValueError(f"{path} holds no LiDB adapter: no subfolder such as unet/ has an {CONFIG_NAME}; name another")


def _read_part(folder: Path) -> tuple[LiDBConfig, dict[str, Tensor]]:
    """Return the config and the tensors of one component's adapter."""
    names = [name for name in (SAFETENSORS_WEIGHTS_NAME, _DIFFUSERS_WEIGHTS_NAME) if (folder / name).is_file()]
    if not names:
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter again, as safetensors")
    file, config_file = folder / names[0], folder / CONFIG_NAME
    tensors, metadata = read_tensors(file)
    if config_file.is_file():
        settings = read_json_object(config_file, _SAVE_AGAIN)
    elif _DIFFUSERS_CONFIG in metadata:
        settings = parse_json_object(metadata[_DIFFUSERS_CONFIG], f"the config in {file}", _SAVE_AGAIN)
    else:
        raise ValueError(f"{folder} has no {CONFIG_NAME}; {_SAVE_AGAIN}")
    kind = settings.get("peft_type")
    if kind != LiDBPeftType.LIDB:
        shown = printable(str(kind))
        raise ValueError(f"{folder} holds a {shown} adapter; load that with the pipeline's load_lora_weights")
    return read_peft_config(settings, f"the config in {folder}"), tensors


def _components(pipeline: "DiffusionPipeline", names: Iterable[str], path: Path) -> dict[str, Any]:
    models = {name: getattr(pipeline, name, None) for name in names}
    missing = [name for name, model in models.items() if not isinstance(model, nn.Module)]
    if missing:
        raise ValueError(
            f"{path} has a part for {', '.join(missing)}, which this {type(pipeline).__name__} lacks; use the "
            "architecture it was made for"
        )
    return models


@contextmanager
def _added(models: dict[str, Any], configs: dict[str, LiDBConfig], adapter_name: str, weight: float) -> Iterator[None]:
    """Give each model a fresh adapter, which the block fills; activate it then, or remove it if the block fails."""
    active = {name: _check_ready(name, model, adapter_name) for name, model in models.items()}
    with ExitStack() as undo:
        for name, model in models.items():
            undo.callback(_remove, model, adapter_name, active[name])
            # The model keeps its config and fills it in.
            model.add_adapter(copy.deepcopy(configs[name]), adapter_name=adapter_name)
        yield
        undo.pop_all()
    for name, model in models.items():
        model.set_adapter([*active[name], adapter_name])
        for module in model.modules():
            if isinstance(module, LiDBLayer):
                module.set_scale(adapter_name, weight)


def _remove(model: Any, adapter_name: str, active: list[str]) -> None:
    """Take an adapter off, if it is there, and make those active that were."""
    from diffusers.utils import delete_adapter_layers

    if adapter_name in getattr(model, "peft_config", {}):
        delete_adapter_layers(model, adapter_name)
        if active:
            model.set_adapter(active)


def _check_ready(component: str, model: nn.Module, adapter_name: str) -> list[str]:
    """Return the adapters that are active on a model, which must be able to take another one."""
    if isinstance(model, PeftModel):
        raise ValueError(f"the {component} is a PeftModel; give the pipeline the model inside, its get_base_model()")
    known = getattr(model, "peft_config", {})
    if adapter_name in known:
        raise ValueError(f"the {component} has an adapter called {adapter_name!r}; choose another adapter_name")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"the {component} is offloaded to the meta device; load the adapter before offloading")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(f"the {component} has fused adapters, which would hide another one; call unfuse_lora first")
    return [name for name in layers[0].active_adapters if name in known] if layers else []
