"""One person's photos in, a standard LoRA out: predict or fit theta, relax the rank, finetune, join both (section 4).

theta starts at a hypernetwork's prediction, at a theta file, or at the shared starting vector.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from converters import KohyaMetadata, write_lora
from hypernet.base_models import BaseModel
from hypernet.diffusion import encode_photos
from hypernet.fitting.engine import Subject, fit_lora, fit_theta
from hypernet.inputs.people import identity_key
from hypernet.inputs.photos import Photo, load_photo, read_image
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import Hypernet, check_recipe, config_of, predict_person, read_once
from hypernet.recipe import TARGET_STEPS, PersonalizeConfig, Progress, StageProgress
from hypernet.sampling import contact_sheet, generate, save_picture
from lidb_peft import LiDBConfig, LiDBSpace, LoraFactors, base_fingerprint, check_record, load_theta, save_theta
from lidb_peft.files import check_writable

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
        photos: the prepared photos.
        bases: the learned bases of ``theta``, by label; None if they are the frozen ones.
        seconds: time of each stage.
        losses: mean denoising loss of each step, by stage.
        files: what was written.
    """

    base: BaseModel
    space: LiDBSpace
    config: PersonalizeConfig
    theta: Tensor
    theta_factors: LoraFactors
    factors: LoraFactors
    photos: list[Photo]
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
    config = _choose_recipe(config, from_theta, config_of(hypernet))
    space, theta, network = _open_start(base, lidb_config, from_theta, hypernet)
    bases = None
    seconds: dict[str, float] = {}
    losses: dict[str, Tensor] = {}

    def stage(name: str):
        return None if progress is None else partial(progress, name)

    with _timed(seconds, "prepare photos"):
        prepared = [load_photo(photo, base.size_px, crop=config.crop) for photo in photos]
        subject = make_subject(base, prepared, config.trigger, config.class_prompt)
    if network is not None:
        with _timed(seconds, "predict"):
            theta, bases = predict_person(network, prepared, base.device, stage("predict"))
        del network  # it may be larger than the base
    if config.theta_steps:
        with _timed(seconds, "fit theta"):
            (theta,), losses["fit theta"] = fit_theta(
                base, space, [subject], config.theta_fit, theta, stage("fit theta"), bases
            )
    theta_factors = space.factors(theta, bases)
    factors = theta_factors
    if config.steps:
        beside = None if torch.equal(theta, space.theta_0) else theta  # the identity would only add to the rank
        with _timed(seconds, "finetune LoRA"):
            (factors,), losses["finetune LoRA"] = fit_lora(
                base, space, [subject], config.lora_fit, config.rank, beside, stage("finetune LoRA"), bases
            )
    return Personalization(base, space, config, theta, theta_factors, factors, prepared, bases, seconds, losses)


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
    config = _choose_recipe(config, from_theta, config_of(hypernet))
    check_outputs(out, config, save_theta, from_theta, config_of(hypernet))
    result = personalize(photos, base, config, lidb_config, from_theta, hypernet, progress)
    if previews is None:
        result.save(out)
    else:
        _save_with_pictures(result, out, [result.config.trigger, *previews], progress)
    if save_theta is not None:
        result.save_theta(save_theta)
    return result


def _save_with_pictures(
    result: Personalization, out: Path, prompts: Sequence[str], progress: StageProgress | None
) -> None:
    """Draw the prompts; the first is the LoRA's preview, and all of them, if there are more, make a sheet."""

    def draw(stage: str, factors: LoraFactors | None) -> list[Image.Image]:
        report = None if progress is None else partial(progress, stage)
        return result.draw(prompts, factors, progress=report)

    with _timed(result.seconds, "draw preview"):
        pictures = draw("draw preview", result.factors)
    result.save(out, preview=pictures[0])
    if len(prompts) > 1:
        file = out.with_name(f"{out.stem}-preview.png")
        save_picture(contact_sheet([("LoRA", pictures), ("base", draw("draw base", None))], prompts), file)
        result.files.append(file)


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
    config = _choose_recipe(config, from_theta, network)
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
        if target.suffix.lower() != ".safetensors":
            raise ValueError(f"{target} does not end in .safetensors; name the file so, or readers will not find it")
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


def _choose_recipe(
    config: PersonalizeConfig | None, from_theta: str | Path | None, network: HyperNetworkConfig | None
) -> PersonalizeConfig:
    """The recipe that is meant, checked against where theta starts."""
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


def _open_start(
    base: BaseModel,
    lidb_config: LiDBConfig | None,
    from_theta: str | Path | None,
    hypernet: HyperNetwork | HyperNetworkConfig | None,
) -> tuple[LiDBSpace, Tensor, HyperNetwork | None]:
    """The space of theta, where it starts ``(L, row)``, and the hypernetwork that will say better."""
    if hypernet is not None:
        network = hypernet
        if isinstance(hypernet, HyperNetworkConfig):
            network = HyperNetwork.from_pretrained(hypernet.name_or_path, config=hypernet)
        space = network.space_on(base.adapted)
        return space, space.theta_0, network
    if from_theta is not None:
        return *_open_theta(from_theta, base), None
    space = LiDBSpace(base.adapted, lidb_config or LiDBConfig())
    return space, space.theta_0, None


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


def make_subject(base: BaseModel, photos: Sequence[Photo], prompt: str, class_prompt: str = "") -> Subject:
    """One identity from its prepared photos; the key is a digest of their pixels, so a photo has one noise stream."""
    if not photos:
        raise ValueError("there is no photo; pass at least one")
    pixels = torch.stack([photo.to_tensor() for photo in photos])
    return Subject(
        key=identity_key(pixels), moments=encode_photos(base, pixels), prompt=prompt, class_prompt=class_prompt
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
