"""Requests: options, config, hypernetwork, theta file and photos, resolved and checked once.

A request is made before a base model is loaded, which may mean downloading gigabytes, and checks its parts, the cheap
checks first. `hypernet.personalization` and `hypernet.personalization_each` use it unchanged.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from converters.sidecar import check_companions, is_our_picture
from hypernet.base_models.loading import Base, base_inputs, base_name
from hypernet.bundles import find_bundle, hypernetwork_source
from hypernet.checkpoints import due_steps, state_path, step_path
from hypernet.fitting.starts import AUTO_START, LoraStart, load_start
from hypernet.inputs.crops import open_photos
from hypernet.inputs.people import People, with_detector
from hypernet.inputs.photos import OpenPhoto
from hypernet.inputs.pictures import PhotoLike, list_photos
from hypernet.inputs.recognition import check_recogniser
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork, read_config
from hypernet.network.prediction import Hypernet, check_recipe, predicted_recipe
from hypernet.recipe import PRESERVED, TARGET_STEPS, PersonalizeConfig, changed
from hypernet.watching import Watch
from lidb_peft import LiDBConfig, ThetaFile, load_theta
from lidb_peft.outputs import check_distinct, check_output, check_output_folder

_log = logging.getLogger(__name__)
NO_THETA_FILE = (
    "the hypernetwork has learned its bases, and a theta file holds none, only a seed; leave --save-theta out, for the "
    "LoRA holds everything, or fit theta with --hypernet none"
)


@dataclass(frozen=True)
class Request:
    """What one person and many have in common.

    Attributes:
        config: how to fit.
        lidb_config: theta's bases and dimensions, where neither a hypernetwork nor a theta file brings its own.
        network: fits start at its prediction; its weights are loaded when they are needed, unless they are given.
        theta_file: what fits start at otherwise; None is the shared starting vector.
        theta_source: the file it was read from.
        previews: prompts to be drawn beside the trigger prompt; None draws nothing at all.
        start: the LoRA that finetunings start from; ``auto`` is the one beside the hypernetwork, or without one beside
            the base, if there is one; None draws each a fresh one.
        overwrite: files that are there may be replaced, unless they are inputs.
        save_every, preview_every: steps between intermediate LoRAs, and between sample pictures; None is none.
        weights: of the LoRAs on the sheet of intermediate ones.
    """

    config: PersonalizeConfig
    lidb_config: LiDBConfig
    network: HyperNetwork | HyperNetworkConfig | None = None
    theta_file: ThetaFile | None = None
    theta_source: str = ""
    previews: tuple[str, ...] | None = None
    start: LoraStart | str | None = None
    overwrite: bool = False
    save_every: int | None = None
    preview_every: int | None = None
    weights: tuple[float, ...] = (1.0,)

    @property
    def network_config(self) -> HyperNetworkConfig | None:
        return _config_of(self.network)

    @property
    def prompts(self) -> list[str]:
        """Everything that the base will be asked to read, for bases that read all prompts before anything else."""
        config, told = self.config, [self.config.trigger, *(self.previews or ())]
        if config.preservation:
            told.append(config.class_prompt)
            told += [each.format(text) for each in PRESERVED for text in (config.trigger, config.class_prompt)]
        return told

    def check_file(self, out: Path, inputs: Sequence[str | Path | None] = ()) -> None:
        """Raise ValueError or OSError now if the LoRA ``out``, or what goes with it, cannot or must not be written."""
        check_output(out, inputs, overwrite=self.overwrite)
        sheet = sheet_path(out) if self.previews else None
        check_companions(out, self.config.trigger, inputs, self.previews is not None, sheet, self.overwrite)

    @property
    def steps_kept(self) -> list[int]:
        """The intermediate steps of the last stage whose LoRAs are kept."""
        return due_steps(self.save_every, self.config.steps or self.config.theta_steps)

    def loras_of(self, out: Path) -> list[Path]:
        """The LoRA ``out`` and before it the intermediate ones that are there."""
        return [*filter(Path.exists, (step_path(out, step) for step in self.steps_kept)), out]

    def intermediate_pictures(self, out: Path) -> list[Path]:
        """What is drawn of the way to the LoRA ``out``: samples, its loss, and the sheet of intermediate LoRAs."""
        drawn = due_steps(self.preview_every, self.config.steps or self.config.theta_steps)
        pictures = [step_path(out, step, ".png") for step in drawn]
        if self.save_every is None:
            return pictures
        return [*pictures, loss_path(out), *([] if self.previews is None else [steps_sheet_path(out)])]

    def check_intermediate_files(
        self, out: Path, inputs: Sequence[str | Path | None] = (), is_resumed: bool = False
    ) -> None:
        """As `check_file`, of what is left on the way to ``out``.

        Args:
            is_resumed: intermediate LoRAs that are there are of the same fit, which was stopped.
        """
        free = self.overwrite or is_resumed
        for step in self.steps_kept:
            path = step_path(out, step)
            check_output(path, inputs, overwrite=free)
            check_companions(path, self.config.trigger, inputs, overwrite=free)
        for path in self.intermediate_pictures(out):
            check_output(path, inputs, ".png", self.overwrite or is_our_picture(path))


@dataclass(frozen=True)
class PersonRequest(Request):
    """One person.

    Attributes:
        photos: of that person, decoded and with their faces found, at least one.
        left_out: photos that cannot be used, a sentence for each.
        out: the LoRA to write; None writes nothing.
        save_theta: the theta file to write.
        resume: go on from the state that a fit of the same left, which was stopped.
    """

    photos: tuple[OpenPhoto, ...] = ()
    left_out: tuple[str, ...] = ()
    out: Path | None = None
    save_theta: Path | None = None
    resume: bool = False

    @property
    def planned_files(self) -> list[Path]:
        """What will be written, if nothing stops the fit."""
        if self.out is None:
            return []
        files = [self.out, self.out.with_suffix(".json")]
        if self.previews is not None:
            files += [self.out.with_suffix(".png"), *([sheet_path(self.out)] if self.previews else [])]
        files += [step_path(self.out, step) for step in self.steps_kept] + self.intermediate_pictures(self.out)
        return files + ([] if self.save_theta is None else [self.save_theta])

    def check_intermediate(self, inputs: Sequence[str | Path | None] = ()) -> None:
        """Raise ValueError or OSError now if what the fit leaves while it runs cannot or must not be written."""
        if self.out is None:
            if self.resume:
                raise ValueError("a fit is resumed from files; name the LoRA that it was to write")
            return
        state = state_path(self.out)
        if self.resume and not state.is_file():
            raise FileNotFoundError(f"{state} does not exist, so there is no fit to resume; leave --resume out")
        if state.exists() and not (self.overwrite or self.resume):
            raise FileExistsError(
                f"{state} is left by a stopped fit; pass --resume to continue it, or --overwrite to start over"
            )
        self.check_intermediate_files(self.out, inputs, self.resume)


@dataclass(frozen=True)
class PeopleRequest(Request):
    """Everybody of a data set.

    Attributes:
        people: of `open_people`.
        out: the folder of the LoRAs.
        batch_size: people fitted at once; None is as many as fit into the GPU's memory, or a few on a CPU.
    """

    people: People | None = None
    out: Path = Path()
    batch_size: int | None = None


def request_person(
    photos: PhotoLike | Iterable[PhotoLike],
    out: str | Path | None = None,
    config: PersonalizeConfig | None = None,
    save_theta: str | Path | None = None,
    from_theta: str | Path | None = None,
    hypernet: Hypernet | None = None,
    lidb_config: LiDBConfig | None = None,
    previews: Sequence[str] | None = None,
    start: str | Path | None = AUTO_START,
    base: Base = "",
    overwrite: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    save_every: int | None = None,
    preview_every: int | None = None,
    weights: Sequence[float] = (1.0,),
    resume: bool = False,
) -> PersonRequest:
    """Resolve what `hypernet.personalization.personalize_to_files` takes.

    Args:
        photos: files, folders and pictures.
        base: whose defaults apply; it may be a file or folder and is not written over. Nothing of it is loaded.
        options: fields of the config to change.

    Raises:
        ValueError, OSError: a photo, theta file or hypernetwork is unusable, they do not go with each other or with
            ``config``, an option is none, or an output cannot be written.
    """
    common = _resolve(base, config, from_theta, hypernet, lidb_config, previews, start, overwrite, options)
    Watch(save_every, preview_every)
    out, save_theta = (None if path is None else Path(path) for path in (out, save_theta))
    photos = list_photos(photos)
    _check_theta_is_made(save_theta, from_theta, common["config"], _config_of(common["network"]))
    inputs = [
        *(photo for photo in photos if isinstance(photo, str | Path)),
        *base_inputs(base),
        from_theta,
        start,
        _folder_of(common),
    ]
    if out is not None:
        Request(**common).check_file(out, inputs)
    if save_theta is not None:
        check_distinct([*([] if out is None else [("the LoRA", out)]), ("the LiDB weights", save_theta)])
        check_output(save_theta, inputs, overwrite=overwrite)
    if from_theta is not None:
        common |= {"theta_file": load_theta(from_theta), "theta_source": str(from_theta)}
    request = PersonRequest(
        **common, out=out, save_theta=save_theta, save_every=save_every, preview_every=preview_every,
        weights=tuple(weights), resume=resume,
    )  # fmt: skip
    request.check_intermediate(inputs)
    config = request.config
    opened, left_out = open_photos(photos, config.crop, config.face_detector, config.face)
    return replace(request, photos=opened, left_out=left_out)


def request_people(
    people: People,
    out: str | Path,
    config: PersonalizeConfig | None = None,
    hypernet: Hypernet | None = None,
    lidb_config: LiDBConfig | None = None,
    previews: Sequence[str] | None = None,
    batch_size: int | None = None,
    start: str | Path | None = AUTO_START,
    base: Base = "",
    overwrite: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    save_every: int | None = None,
    preview_every: int | None = None,
    weights: Sequence[float] = (1.0,),
) -> PeopleRequest:
    """Resolve what `hypernet.personalization_each.personalize_each` takes.

    Args:
        base, options: as for `request_person`.

    Raises:
        ValueError: ``config`` does not go with the hypernetwork, or faces are to be found and cannot be.
        ValueError, OSError: ``out`` is in the data set's own folder, or as `check_output_folder`.
    """
    out = Path(out)
    common = _resolve(base, config, None, hypernet, lidb_config, previews, start, overwrite, options)
    Watch(save_every, preview_every)
    check_output_folder(out, [people.source, *base_inputs(base), start, _folder_of(common)], may_hold_inputs=True)
    return PeopleRequest(
        **common, people=people, out=out, batch_size=batch_size, save_every=save_every, preview_every=preview_every,
        weights=tuple(weights),
    )  # fmt: skip


def _resolve(
    base: Base,
    config: PersonalizeConfig | None,
    from_theta: str | Path | None,
    hypernet: Hypernet | None,
    lidb_config: LiDBConfig | None,
    previews: Sequence[str] | None,
    start: str | Path | None,
    overwrite: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of `Request` but for the theta file; the recipe is checked against where theta starts."""
    name = base_name(base)
    bundle = find_bundle(name)
    if hypernet == "auto" and (config is not None or from_theta is not None):
        hypernet = None
    if isinstance(hypernet, str | Path):
        source = hypernetwork_source(hypernet, name)
        hypernet = None if source is None else read_config(source)
        if hypernet is not None:
            _log.info("starting at the prediction of the hypernetwork %s", source)
    network = hypernet
    described = _config_of(network)
    if config is None:
        config = bundle.recipe if described is None else predicted_recipe(described, bundle.recipe)
    config = changed(config, options)
    if from_theta is not None and network is not None:
        raise ValueError("from_theta and hypernet are both given; theta can start at one of them only")
    if described is not None:
        config = check_recipe(described, config)
    config = with_detector(config)
    check_recogniser(name, config)
    if network is None and from_theta is None and not config.theta_steps and not config.steps:
        raise ValueError(
            "theta_steps and steps are both 0, so that nothing would be fitted; choose 1 or more of either"
        )
    return {
        "config": config,
        "lidb_config": lidb_config or bundle.lidb_config,
        "network": network,
        "previews": None if previews is None else tuple(previews),
        "start": _read_start(start, config, network is not None),
        "overwrite": overwrite,
    }


def _read_start(start: str | Path | None, config: PersonalizeConfig, is_predicted: bool) -> LoraStart | str | None:
    """The start that is named, read and of the recipe's rank; ``auto`` as it is, for the base may have one too."""
    if start is None or not (config.steps or is_predicted):
        return None
    return AUTO_START if start == AUTO_START else load_start(start).of_rank(config.rank)


def sheet_path(out: Path) -> Path:
    """Where the sheet of the further prompts goes."""
    return out.with_name(f"{out.stem}-preview.png")


def steps_sheet_path(out: Path) -> Path:
    """Where the sheet of intermediate LoRAs goes."""
    return out.with_name(f"{out.stem}-sheet.png")


def loss_path(out: Path) -> Path:
    """Where the picture of the loss goes."""
    return out.with_name(f"{out.stem}-loss.png")


def _folder_of(common: dict[str, Any]) -> str:
    """Where the hypernetwork was read from, "" if nobody knows."""
    return getattr(_config_of(common["network"]), "name_or_path", "")


def _check_theta_is_made(
    save_theta: Path | None,
    from_theta: str | Path | None,
    config: PersonalizeConfig,
    network: HyperNetworkConfig | None,
) -> None:
    if save_theta is not None and network is not None and network.learned_bases:
        raise ValueError(NO_THETA_FILE)
    if save_theta is not None and network is None and from_theta is None and not config.theta_steps:
        raise ValueError(
            f"there would be no LiDB weights to save in {save_theta}: theta_steps is 0; choose 1 or more, such as "
            f"{TARGET_STEPS}"
        )


def _config_of(network: HyperNetwork | HyperNetworkConfig | None) -> HyperNetworkConfig | None:
    return cast(HyperNetworkConfig, network.config) if isinstance(network, HyperNetwork) else network
