"""One person's photos in, a standard LoRA out: predict or fit theta, relax the rank, finetune, join both (section 4).

theta starts at a hypernetwork's prediction, at a theta file, or at the shared starting vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from converters import KohyaMetadata, write_lora
from hypernet.bases.base import BaseModel
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.photos import Photo, load_photo, read_image
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import Hypernet, check_recipe, config_of, load_network, predict_people, read_once
from hypernet.recipe import TARGET_STEPS, PersonalizeConfig, Progress, StageProgress
from hypernet.sampling import contact_sheet, generate, save_picture
from hypernet.timing import timed
from lidb_peft import LiDBConfig, LiDBSpace, LoraFactors, base_fingerprint, check_record, load_theta, save_theta
from lidb_peft.files import check_suffix, check_writable

_NO_THETA_FILE = (
    "the hypernetwork has learned its bases, and a theta file holds none, only a seed; leave --save-theta out, for the "
    "LoRA holds everything, or fit theta with --hypernet none"
)


@dataclass
class Personalization:
    """A person's weights.

    Attributes:
        theta: ``(L, row)``.
        theta_factors: theta as LoRA factors.
        factors: theta and the finetuned LoRA as one set of factors, what the LoRA file holds.
        photos: the prepared photos, at least one.
        bases: the learned bases of ``theta``, by label; None if they are the frozen ones.
        seconds: time of each stage; people who are fitted together share it.
        losses: mean denoising loss of each step, ``(steps, 1)``, by stage.
        files: what was written.
    """

    base: BaseModel
    space: LiDBSpace
    config: PersonalizeConfig
    theta: Tensor
    theta_factors: LoraFactors
    factors: LoraFactors
    photos: Sequence[Photo]
    bases: dict[str, Tensor] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def draw(
        self,
        prompts: Sequence[str],
        factors: LoraFactors | None,
        num_steps: int = 30,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Draw prompts with ``factors``, this person's or None for the base, from the noise of the config's seed."""
        return generate(
            self.base, prompts, self.space, factors,
            seed=self.config.seed, num_steps=num_steps, guidance=self.config.guidance, progress=progress,
        )  # fmt: skip

    def save(self, path: str | Path, preview: Image.Image | None = None, dtype: torch.dtype = torch.float16) -> None:
        """Write the LoRA as kohya safetensors with A1111's sidecar and, if given, a preview picture."""
        metadata = lora_metadata(self.base, self.config.trigger, num_photos=len(self.photos))
        self.files += write_lora(path, self.factors, metadata, dtype=dtype, preview=preview)

    def save_theta(self, path: str | Path) -> None:
        """Write theta alone, 53 KB for SD1.5.

        Raises:
            ValueError: its bases are learned.
        """
        if self.bases is not None:
            raise ValueError(_NO_THETA_FILE)
        save_theta(
            path,
            self.theta,
            self.space,
            base_model_name=Path(self.base.name).name,
            base_fingerprint=base_fingerprint(self.base.adapted),
        )
        self.files.append(Path(path))


def personalize(
    photos: Sequence[str | Path],
    base: BaseModel,
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    from_theta: str | Path | None = None,
    hypernet: Hypernet | None = None,
    progress: StageProgress | None = None,
) -> Personalization:
    """Personalise a base model on photos of one person.

    Args:
        config: default ``PersonalizeConfig()``, with a hypernetwork its `predicted_recipe`.
        lidb_config: the bases; default the paper's, a = 100 and b = 50. Theta files and hypernetworks bring their own.
        from_theta: a theta file to start from instead of the shared starting vector.
        hypernet: starts at its prediction from the photos; a network that is given stays where it is.

    Raises:
        ValueError, OSError: a photo is unusable, the hypernetwork is, or it does not go with ``base`` and ``config``;
            the message names it.
    """
    hypernet = read_once(hypernet)
    config = choose_recipe(config, from_theta, config_of(hypernet))
    if not photos:
        raise ValueError("there is no photo; pass at least one")
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare photos"):
        person = PreparedPerson("", tuple(load_photo(photo, base.size_px, crop=config.crop) for photo in photos))
    if isinstance(hypernet, HyperNetworkConfig):
        with timed(seconds, "load hypernetwork"):
            hypernet = load_network(hypernet).to(base.device)
    space, theta = open_start(base, lidb_config, from_theta, hypernet)
    bases = None
    if hypernet is not None:
        with timed(seconds, "predict"):
            report = None if progress is None else partial(progress, "predict")
            theta, bases = predict_people(hypernet, [person], base.device, report)
        del hypernet  # it may be larger than the base
    (result,) = fit_people([person], base, space, config, theta, bases, seconds, progress)
    return result


def fit_people(
    people: Sequence[PreparedPerson],
    base: BaseModel,
    space: LiDBSpace,
    config: PersonalizeConfig,
    theta: Tensor,
    bases: dict[str, Tensor] | None,
    seconds: dict[str, float],
    progress: StageProgress | None = None,
) -> list[Personalization]:
    """Fit people at once, each with weights of their own.

    Args:
        theta: where they start, ``(L, row)`` or ``(N, L, row)``.
        bases: learned ones that theta is in, by label; None takes the frozen ones.
        seconds: the time of each stage is added to this, which becomes every result's.
    """
    losses: dict[str, Tensor] = {}

    def stage(name: str) -> Progress | None:
        return None if progress is None else partial(progress, name)

    with timed(seconds, "prepare photos"):
        subjects = make_subjects(base, people, config.trigger, config.class_prompt)
    if config.theta_steps:
        with timed(seconds, "fit theta"):
            theta, losses["fit theta"] = fit_theta(
                base, space, subjects, config.theta_fit, theta, stage("fit theta"), bases
            )
    theta = theta.expand(len(people), *space.theta_0.shape)
    theta_factors = [space.factors(own, bases) for own in theta]
    factors = theta_factors
    if config.steps:
        is_identity = torch.equal(theta, space.theta_0.expand_as(theta))  # which would only add to the rank
        with timed(seconds, "finetune LoRA"):
            factors, losses["finetune LoRA"] = fit_lora(
                base, space, subjects, config.lora_fit, config.rank, None if is_identity else theta,
                stage("finetune LoRA"), bases,
            )  # fmt: skip
    return [
        Personalization(
            base, space, config, theta[i], theta_factors[i], factors[i], person.photos, bases, seconds,
            {name: values[:, i : i + 1] for name, values in losses.items()},
        )
        for i, person in enumerate(people)
    ]  # fmt: skip


def personalize_to_files(
    photos: Sequence[str | Path],
    base: BaseModel,
    out: str | Path,
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    previews: Sequence[str] | None = (),
    save_theta: str | Path | None = None,
    from_theta: str | Path | None = None,
    hypernet: Hypernet | None = None,
    progress: StageProgress | None = None,
) -> Personalization:
    """Personalise and write the LoRA ``out``, its sidecar and its preview picture (the trigger prompt, drawn).

    Args:
        previews: further prompts, drawn with the LoRA on the sheet ``<out>-preview.png``, above the base's own;
            None draws nothing, not even the preview picture.
        save_theta: write theta there too.
        config, lidb_config, from_theta, hypernet: as for `personalize`.

    Raises:
        ValueError, OSError: an output cannot be written; found out before any work is done.
    """
    out, hypernet = Path(out), read_once(hypernet)
    config = choose_recipe(config, from_theta, config_of(hypernet))
    check_outputs(out, config, save_theta, from_theta, config_of(hypernet))
    result = personalize(photos, base, config, lidb_config, from_theta, hypernet, progress)
    base_pictures = draw_base(result, previews, progress)
    write_result(result, out, previews, base_pictures, progress)
    if save_theta is not None:
        result.save_theta(save_theta)
    return result


def draw_base(
    result: Personalization, previews: Sequence[str] | None, progress: StageProgress | None = None
) -> list[Image.Image]:
    """Draw what a sheet of ``previews`` shows below anybody's own pictures; nothing if there is to be no sheet."""
    if not previews:
        return []
    with timed(result.seconds, "draw"):
        report = None if progress is None else partial(progress, "draw base")
        return result.draw([result.config.trigger, *previews], None, progress=report)


def write_result(
    result: Personalization,
    out: Path,
    previews: Sequence[str] | None,
    base_pictures: Sequence[Image.Image],
    progress: StageProgress | None = None,
) -> None:
    """Draw a person and write the pictures and, last, the LoRA; see `personalize_to_files`."""
    preview, prompts = None, [result.config.trigger, *(previews or ())]
    if previews is not None:
        with timed(result.seconds, "draw"):
            report = None if progress is None else partial(progress, "draw preview")
            preview, *_ = pictures = result.draw(prompts, result.factors, progress=report)
    with timed(result.seconds, "export"):
        if base_pictures:
            file = out.with_name(f"{out.stem}-preview.png")
            save_picture(contact_sheet([("LoRA", pictures), ("base", base_pictures)], prompts), file)
            result.files.append(file)
        result.save(out, preview)


def check_request(
    photos: Sequence[str | Path],
    out: str | Path,
    config: PersonalizeConfig | None = None,
    save_theta: str | Path | None = None,
    from_theta: str | Path | None = None,
    hypernet: Hypernet | None = None,
) -> None:
    """Find what is wrong with the files before a base model is loaded, which may be a download of gigabytes.

    Raises:
        ValueError, OSError: a photo, theta file or hypernetwork is unusable, they do not go with each other or with
            ``config``, or an output cannot be written.
    """
    network = config_of(read_once(hypernet))
    config = choose_recipe(config, from_theta, network)
    check_outputs(out, config, save_theta, from_theta, network)
    if from_theta is not None:
        load_theta(from_theta)
    for photo in photos:
        read_image(photo)


def check_outputs(
    out: str | Path,
    config: PersonalizeConfig,
    save_theta: str | Path | None = None,
    from_theta: str | Path | None = None,
    network: HyperNetworkConfig | None = None,
) -> None:
    """Raise now what writing the LoRA and theta would raise after all the work.

    Raises:
        ValueError: a file is not named .safetensors, the LoRA would overwrite a theta file, no theta is made, or its
            bases are those that ``network`` has learned.
        OSError: the folder is not there or not writable.
    """
    targets = [Path(out)] if save_theta is None else [Path(out), Path(save_theta)]
    for target in targets:
        check_suffix(target)
        check_writable(target)
    for theta in (save_theta, from_theta):
        if theta is not None and Path(theta).resolve() == Path(out).resolve():
            raise ValueError(f"{out} would be both the LoRA and the LiDB weights; choose another --out")
    if save_theta is not None and network is not None and network.learned_bases:
        raise ValueError(_NO_THETA_FILE)
    if save_theta is not None and network is None and from_theta is None and not config.theta_steps:
        raise ValueError(
            f"there would be no LiDB weights to save in {save_theta}: theta_steps is 0; choose 1 or more, such as "
            f"{TARGET_STEPS}"
        )


def choose_recipe(
    config: PersonalizeConfig | None, from_theta: str | Path | None, network: HyperNetworkConfig | None
) -> PersonalizeConfig:
    """Return the recipe that is meant, checked against where theta starts."""
    if from_theta is not None and network is not None:
        raise ValueError("from_theta and hypernet are both given; theta can start at one of them only")
    if network is not None:
        return check_recipe(network, config)
    config = config or PersonalizeConfig()
    if from_theta is None and not config.theta_steps and not config.steps:
        raise ValueError(
            "theta_steps and steps are both 0, so that nothing would be fitted; choose 1 or more of either"
        )
    return config


def open_start(
    base: BaseModel, lidb_config: LiDBConfig | None, from_theta: str | Path | None, network: HyperNetwork | None
) -> tuple[LiDBSpace, Tensor]:
    """Return the space of theta and where it starts ``(L, row)``, unless ``network`` says better."""
    if from_theta is not None:
        return _open_theta(from_theta, base)
    space = LiDBSpace(base.adapted, lidb_config or LiDBConfig()) if network is None else network.space_on(base.adapted)
    return space, space.theta_0


def _open_theta(path: str | Path, base: BaseModel) -> tuple[LiDBSpace, Tensor]:
    """A theta file's own space on ``base``, and its theta ``(L, row)``, checked against that space."""
    file = load_theta(path)
    space = LiDBSpace(base.adapted, file.config)
    check_record(file.record, space, str(path))
    return space, file.theta


def lora_metadata(base: BaseModel, trigger: str, num_photos: int = 0) -> KohyaMetadata:
    """What a LoRA file of this base tells its readers."""
    return KohyaMetadata(
        family=base.family,
        v_prediction=base.prediction_type == "v_prediction",
        trigger=trigger,
        base_model_name=Path(base.name).name,
        resolution_px=base.size_px,
        num_photos=num_photos,
    )
