"""LiDB weights in files, a theta file or the folders that PEFT saves, and the exact LoRA of either.

Neither stores the widths of its layers. They come from the families' tables (:mod:`lidb_peft.families`), or from the
base model if it belongs to no family.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from converters.formats.layout import BASIS_START
from converters.formats.reading import Source, find_sources, place_of
from converters.layer import LoraLayer
from converters.lora import Lora
from lidb_peft import LiDBConfig
from lidb_peft.families import FAMILIES
from lidb_peft.layer import LiDBLayer
from lidb_peft.layout import layers_hash
from lidb_peft.naming import find_layers
from lidb_peft.record import MALFORMED, check_record, read_peft_config, recorded_models
from lidb_peft.relax import peft_factors
from lidb_peft.safe_read import examples, printable
from lidb_peft.space import LiDBSpace
from lidb_peft.theta import ThetaFile, load_theta, save_theta

# layer name -> (in_features, out_features)
Shapes = dict[str, tuple[int, int]]
_BASE_NAME = "name_or_path"  # the attribute of a model that PEFT writes down as its base
_WHICH_BASE = "pass the base model that it was made for (--base)"


@dataclass(frozen=True)
class LiDBWeights:
    """One identity's LiDB weights.

    Args:
        models: component -> its LiDB adapter, on a model that has only the adapted layers, without weights.
        family: name of one of ``lidb_peft.families``; "" if the layers do not determine it.
        base_model_name, base_fingerprint: as in a theta file.
    """

    models: dict[str, PeftModel]
    family: str
    base_model_name: str = ""
    base_fingerprint: str = ""

    def to_lora(self) -> Lora:
        """Return the float32 LoRA of the same update; exact, with alpha = rank."""
        factors = {name: pair for component, model in self.models.items()
                   for name, pair in peft_factors(model, component).items()}  # fmt: skip
        layers = {name: LoraLayer(lora_A, lora_B, float(len(lora_A))) for name, (lora_A, lora_B) in factors.items()}
        return Lora(layers, self.family, {"ss_sd_model_name": self.base_model_name} if self.base_model_name else {})

    def peft_folders(self) -> dict[str, tuple[dict[str, object], dict[str, Tensor]]]:
        """Return component -> config and tensors, as PEFT saves them."""
        return {
            component: (
                model.peft_config["default"].to_dict(),
                get_peft_model_state_dict(model, save_embedding_layers=False),
            )
            for component, model in self.models.items()
        }

    def save_theta(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """Write a theta file, in float16 if that represents every number exactly, else in float32.

        Raises:
            ValueError: the models have different settings, or bases of their own, which a theta file cannot hold.
        """
        config = _one_config([cast(LiDBConfig, model.peft_config["default"]) for model in self.models.values()])
        space = LiDBSpace(self.models, config)
        adapted = sum(isinstance(module, LiDBLayer) for model in self.models.values() for module in model.modules())
        if space.num_layers != adapted:
            raise ValueError(f"the adapters are on {adapted} layers, their settings name {space.num_layers}")
        theta = space.theta_from_adapters()
        if dtype is None:
            dtype = torch.float16 if torch.equal(theta.half().float(), theta) else torch.float32
        save_theta(path, theta, space, self.base_model_name, self.base_fingerprint, dtype)


@dataclass(frozen=True)
class _Folder:
    """The contents of one model's adapter files: its layers, by our names, and the labels of its bases."""

    path: Path
    config: LiDBConfig
    layers: tuple[str, ...]
    bases: frozenset[str]

    @property
    def component(self) -> str:
        return self.layers[0].partition(".")[0]


def read_theta(path: Path, models: Mapping[str, nn.Module] | None = None) -> LiDBWeights:
    """Read a theta file.

    Args:
        models: models of the base, for a theta of no family in ``FAMILIES``, and to check its weights.

    Raises:
        ValueError: not a theta file, or unknown layers.
    """
    file = load_theta(path)
    models = models and recorded_models(models, file.base_fingerprint, str(path))
    family, shapes = ("", _shapes_of(models, file.config)) if models else _shapes_by_hash(path, file)
    check_record(file.record, LiDBSpace(models or skeleton_models(shapes, "meta"), file.config), str(path))
    adapters: dict[str, PeftModel] = {}
    for component, skeleton in skeleton_models(shapes, "cpu").items():
        setattr(skeleton, _BASE_NAME, file.base_model_name or None)
        adapters[component] = cast(PeftModel, get_peft_model(skeleton, file.config))
    LiDBSpace(adapters, file.config).load_into_adapters(file.theta)
    return LiDBWeights(adapters, family, file.base_model_name, file.base_fingerprint)


def read_lidb_folder(path: Path, models: Mapping[str, nn.Module] | None = None) -> LiDBWeights:
    """Read a LiDB adapter that PEFT saved; see `read_theta` for ``models``.

    Raises:
        ValueError: a damaged adapter, or one on unknown layers.
    """
    folders = {folder.component: folder for folder in map(_read_folder, find_sources(path))}
    if models:
        family = ""
        shapes = {name: shape for component, folder in folders.items() if component in models
                  for name, shape in _shapes_of({component: models[component]}, folder.config).items()}  # fmt: skip
        unknown = [name for folder in folders.values() for name in folder.layers if name not in shapes]
        if unknown:
            raise ValueError(f"{path} holds layers that its config does not name, or this model does not have: "
                             f"{examples(unknown)}; it is damaged, or of another base")  # fmt: skip
    else:
        family, shapes = _shapes_by_bases(path, folders.values())
    skeletons = skeleton_models({name: shapes[name] for folder in folders.values() for name in folder.layers}, "cpu")
    adapters = {}
    for component, folder in folders.items():
        try:
            adapters[component] = PeftModel.from_pretrained(skeletons[component], str(folder.path), torch_device="cpu")
        except MALFORMED as error:
            raise ValueError(f"{folder.path} is damaged: its config and its tensors do not go together "
                             f"({printable(str(error))})") from error  # fmt: skip
    bases = (folder.config.base_model_name_or_path for folder in folders.values())
    return LiDBWeights(adapters, family, next(filter(None, bases), ""))


def _read_folder(source: Source) -> _Folder:
    header, names = source.header, list(source.header.tensors)
    modules = source.layout.modules.values()
    layers = tuple(name for module in modules for name in place_of(source, module).layers)
    if not layers:
        raise ValueError(f"{source.file} holds no LiDB layers")
    # "lidb_basis.down:320:100.record", or ".values"
    bases = frozenset(name.partition(BASIS_START)[2].rpartition(".")[0] for name in names if BASIS_START in name)
    path = source.file.parent
    config = read_peft_config(source.config or {}, str(path))
    ranks = [config.r, *config.rank_pattern.values()]
    largest = max((max(tensor.shape, default=0) for tensor in header.tensors.values()), default=0)
    if max(ranks) > largest:
        raise ValueError(f"{path} says rank {max(ranks)}, which none of its tensors has; it is damaged")
    return _Folder(path, config, layers, bases)


def _shapes_of(models: Mapping[str, nn.Module], config: LiDBConfig) -> Shapes:
    return {
        name: (layer.in_features, layer.out_features)
        for component, model in models.items()
        for name, layer in find_layers(component, model, config).items()
    }


def _shapes_by_hash(path: Path, file: ThetaFile) -> tuple[str, Shapes]:
    """Return the architecture whose layers have the hash in a theta file, and these layers."""
    for family in FAMILIES.values():
        for shapes in _choices(family.shapes, file.config):
            if layers_hash(shapes) == file.layers_hash:
                return family.name, shapes
    of = f" of {printable(file.base_model_name)}" if file.base_model_name else ""
    raise ValueError(f"{path} belongs to layers{of} that no family has ({', '.join(FAMILIES)}); {_WHICH_BASE}")


def _choices(shapes: Shapes, config: LiDBConfig) -> Iterator[Shapes]:
    """Yield the layers that ``config`` adapts, for each combination of an architecture's models."""
    if config.target_modules is not None:
        shapes = {name: shape for name, shape in shapes.items()
                  if check_target_module_exists(config, name.partition(".")[2])}  # fmt: skip
    components = list(dict.fromkeys(name.partition(".")[0] for name in shapes))
    for count in range(len(components), 0, -1):
        for chosen in itertools.combinations(components, count):
            yield {name: shape for name, shape in shapes.items() if name.partition(".")[0] in chosen}


def _shapes_by_bases(path: Path, folders: Collection[_Folder]) -> tuple[str, Shapes]:
    """Return the architecture that has the layers and needs exactly the bases that the adapters record for them."""
    fitting = {}
    for family in FAMILIES.values():
        shapes = family.shapes
        if all(_fits(shapes, folder) for folder in folders):
            fitting[family.name] = shapes
    if not fitting:
        raise ValueError(f"{path} has layers or bases that no family has ({', '.join(FAMILIES)}); {_WHICH_BASE}")
    first = next(iter(fitting))
    return first if len(fitting) == 1 else "", fitting[first]


def _fits(shapes: Shapes, folder: _Folder) -> bool:
    if not set(folder.layers) <= shapes.keys():
        return False
    needed = {key.label for name in folder.layers for key in folder.config.basis_keys(*shapes[name])}
    return needed == folder.bases


def _one_config(configs: Sequence[LiDBConfig]) -> LiDBConfig:
    """Return the common settings of several adapters, for all of their layers."""
    names = ("r", "down_dim", "up_dim", "scale", "seed", "basis", "layers_to_transform", "layers_pattern")
    first = configs[0]
    differing = [name for name in names if len({repr(getattr(config, name)) for config in configs}) > 1]
    if differing:
        raise ValueError(f"the adapters differ in {', '.join(differing)}; one theta file cannot hold them")
    targets = [config.target_modules for config in configs]
    sets = [target for target in targets if isinstance(target, set)]
    if len(sets) == len(targets):
        union: set[str] = set().union(*sets)
        # The base in adapters that were made without naming one.
        is_default = any(union == family.targets for family in FAMILIES.values())
        return dataclasses.replace(first, target_modules=None if is_default else union)
    if len({repr(target) for target in targets}) > 1:
        raise ValueError("the adapters' target_modules are different expressions; one theta file cannot hold them")
    return first


def skeleton_models(shapes: Shapes, device: str) -> dict[str, nn.Module]:
    """Return component -> a model of these layers alone, whose weights take no memory."""
    models: dict[str, nn.Module] = {}
    for name, (in_features, out_features) in shapes.items():
        component, *parents, last = name.split(".")
        module = models.setdefault(component, nn.Module())
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        if device != "meta":
            linear.weight = nn.Parameter(torch.zeros((), device=device).expand(out_features, in_features), False)
        module.add_module(last, linear)
    return models
