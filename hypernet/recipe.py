"""Settings of fitting and personalising: plain configs, light to import, so that `hdb --help` shows their defaults."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_ENCODER = "google/vit-huge-patch14-224-in21k"

Progress = Callable[[int, int], None]
"""Called with (steps done, total steps) after every step."""
TARGET_STEPS = 100
"""Steps of the LiDB fit that makes a target, by default."""

NUM_TIMESTEPS = 1000
"""Timesteps in Stable Diffusion's noise schedule."""

StageProgress = Callable[[str, int, int | None], None]
"""Called with (stage, steps done, total steps or None if unknown) after every step."""

PRESERVED = (
    "a pencil drawing of {}", "a watercolour painting of {}", "an oil painting of {}", "a cartoon of {}",
    "{} at night", "{} on a beach", "{} in a forest", "{} in a city", "{} wearing a hat", "{} wearing sunglasses",
)  # fmt: skip
"""Prompts whose effect a fit preserves by default; other prompts benefit too."""


ATTENTIONS = ("auto", "sdpa", "xformers")
AUTO = ("auto", "on", "off")
OPTIMIZERS = ("auto", "adamw", "adamw8bit")
FACE_DETECTORS = ("auto", "yunet", "cascade")
FACES = ("largest", "leftmost", "rightmost")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUANTIZATIONS = ("nf4", "int8")
PREDICTIONS = ("auto", "epsilon", "v")


Config = TypeVar("Config", bound="FitConfig | PersonalizeConfig | PreoptimizeConfig | TrainConfig | BaselineConfig")


def changed(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a copy of a config with some fields changed.

    Raises:
        ValueError: there is no such field, or a value is out of range.
    """
    known = [field.name for field in fields(config)]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0) or known
            raise ValueError(f"{name!r} is not an option of {type(config).__name__}; did you mean {nearest[0]!r}?")
    return replace(config, **options)


def setting(
    default: Any,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A config field with its allowed values, which `hdb` and `check_settings` enforce."""
    return field(
        default=default, metadata={"choices": choices, "least": least, "most": most, "above": above, "below": below}
    )


def check_settings(config: Any) -> None:
    """Raise ValueError unless each field has an allowed value; None is allowed where it is the default."""
    for known in fields(config):
        value, allowed = getattr(config, known.name), known.metadata
        if not allowed or (value is None and known.default is None):
            continue
        if allowed["choices"] and value not in allowed["choices"]:
            *others, last = allowed["choices"]
            raise ValueError(f"{known.name} is {value!r}; choose {', '.join(others)} or {last}")
        bounds = [allowed[name] for name in ("least", "most", "above", "below")]
        if any(bound is not None for bound in bounds) and not _is_within(value, *bounds):
            raise ValueError(f"{known.name} is {value}; expected {_range(known.default, *bounds)}")


def _is_within(value: float, least: float | None, most: float | None, above: float | None, below: float | None) -> bool:
    is_large_enough = (least is None or value >= least) and (above is None or value > above)
    return is_large_enough and (value <= most if most is not None else value < (math.inf if below is None else below))


def _range(default: Any, least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    start = f"{least} or more" if above is None else f"more than {above}"
    if most is not None:
        return f"{least} to {most}" if above is None else f"{start} and at most {most}"
    if below is not None:
        return f"{start} and less than {below}"
    return f"a finite number, {start}" if isinstance(default, float) else start


def check_face(face: str) -> None:
    """Raise ValueError unless ``face`` is one of `FACES` or a number from 1 on, as text."""
    if face not in FACES and not (face.isdecimal() and int(face)):
        raise ValueError(f"face is {face!r}; choose {', '.join(FACES)}, or its number from the left, such as 2")


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate of AdamW; decays linearly to a tenth.
        timesteps_per_step: noisy copies of each photo per step.
        max_timestep: sample timesteps below this one; the schedule has 1,000.
        background: weight of the photo's background in the loss; the head has weight 1.
        preservation: weight of prompt preservation, see `hypernet.fitting.preservation`; 0 is off.
        preserved: the prompts whose effect is preserved; ``{}`` stands for the subject.
        likeness: weight of the likeness of drawn pictures, see `hypernet.fitting.likeness`; 0 is off.
        guidance: with which these pictures are drawn; None is the base model's own.
        max_grad_norm: each person's gradient is clipped to this norm.
        seed: random seed; each person's noise depends on it and on their key.
        optimizer: ``adamw``, which ``auto`` also selects, or ``adamw8bit``, which requires bitsandbytes and saves
            little, since so few parameters are trained.
        gradient_checkpointing: recompute activations in the backward pass to save memory: ``on``, ``off``, or
            ``auto``, which is on if a step would not fit into GPU memory otherwise.
        graph: replay the step as a CUDA graph, see `hypernet.fitting.replay`: ``on``, ``off``, or ``auto``, which is
            on wherever possible unless activations are recomputed.
    """

    steps: int = setting(MISSING, least=0)
    lr: float = setting(MISSING, above=0)
    timesteps_per_step: int = setting(1, least=1)
    max_timestep: int = setting(NUM_TIMESTEPS, least=1, most=NUM_TIMESTEPS)
    background: float = setting(1.0, least=0)
    preservation: float = setting(0.0, least=0)
    preserved: tuple[str, ...] = PRESERVED
    likeness: float = setting(0.0, least=0)
    guidance: float | None = None
    max_grad_norm: float = setting(1.0, above=0)
    seed: int = 0
    optimizer: str = setting("adamw", OPTIMIZERS)
    gradient_checkpointing: str = setting("auto", AUTO)
    graph: str = setting("auto", AUTO)

    def __post_init__(self) -> None:
        check_settings(self)
        _check_preserved(self)
        if self.likeness and self.graph == "on":
            raise ValueError(
                "a step that draws pictures cannot be replayed as a CUDA graph; set graph to auto or off, or likeness "
                "to 0"
            )


def _check_preserved(config: "FitConfig | TrainConfig") -> None:
    if config.preservation and not all("{}" in prompt for prompt in config.preserved or ("",)):
        raise ValueError(f"preserved is {config.preserved}; expected prompts with {{}}, which stands for the subject")


@dataclass(frozen=True)
class PersonalizeConfig:
    """Settings of a personalisation.

    Attributes:
        token: rare word that stands for the person in prompts.
        prompt: prompt that describes the photos; ``[V]`` stands for the token.
        adapt: layers to adapt unless a hypernetwork or theta file determines them: those of the ``denoiser``, or
            ``all``, which includes the text encoders. Text encoders forget other prompts sooner than they learn a
            person.
        theta_steps: steps of a LiDB fit before the finetuning; 0 skips it and leaves theta at its start or prediction.
            The same number of finetuning steps achieves more in less time.
        theta_lr: peak learning rate of the LiDB fit.
        steps: steps of the rank-relaxed finetuning, by default half as many after a prediction; 0 skips it.
        lr: peak learning rate of the finetuning.
        rank: rank of the finetuned LoRA; LiDB weights add 1 to the file's.
        timesteps_per_step: noisy copies of each photo per step.
        max_timestep: finetune only on timesteps below this one; lower values preserve composition. What pictures get
            from higher noise levels, their composition and much of the prompt's content, is then not learned from
            the photos.
        background: weight of the photo's background in the loss; the head has weight 1.
        preservation: weight of prompt preservation; 0 is off. See `hypernet.fitting.preservation`.
        preserved: prompt whose effect is preserved; ``{}`` stands for the person.
        likeness: weight of the likeness of pictures that are drawn during the finetuning, as a network that recognises
            people sees it; 0 is off, and 0.5 a good value. It shows more of the person in fewer steps, each of which
            takes longer. Real photos require facenet-pytorch. See `hypernet.fitting.likeness`.
        max_grad_norm: each person's gradient is clipped to this norm.
        optimizer: optimizer to use: ``adamw`` or ``adamw8bit``, which requires bitsandbytes; ``auto`` is ``adamw``.
        gradient_checkpointing: save memory at the cost of speed; ``auto`` turns it on if a step would not fit into GPU
            memory.
        graph: replay steps as a CUDA graph, which is faster; ``auto`` turns it on wherever possible.
        seed: random seed.
        crop: find the face and crop to it; otherwise crop the centre square of the photo.
        face_detector: face detector: ``yunet``, downloaded (233 KB) from the Hugging Face hub on first use, or OpenCV
            4's ``cascade``, which misses more faces; ``auto`` is ``yunet`` if available.
        face: which face to use in a photo of several people: the ``largest`` clear one, ``leftmost``, ``rightmost``,
            or its number from the left, starting at 1.
        guidance: guidance scale of pictures drawn during or after the fit, by default the base model's, such as 7.5 for
            Stable Diffusion.
    """

    token: str = "sks"
    prompt: str = "a [V] face"
    adapt: str = setting("denoiser", ("denoiser", "all"))
    theta_steps: int = setting(0, least=0)
    theta_lr: float = setting(5e-3, above=0)
    steps: int = setting(80, least=0)
    lr: float = setting(5e-4, above=0)
    rank: int = setting(4, least=1)
    timesteps_per_step: int = setting(1, least=1)
    max_timestep: int = setting(NUM_TIMESTEPS, least=1, most=NUM_TIMESTEPS)
    background: float = setting(0.0, least=0)
    preservation: float = setting(1.0, least=0)
    preserved: tuple[str, ...] = PRESERVED
    likeness: float = setting(0.0, least=0)
    max_grad_norm: float = setting(1.0, above=0)
    optimizer: str = setting("adamw", OPTIMIZERS)
    gradient_checkpointing: str = setting("auto", AUTO)
    graph: str = setting("auto", AUTO)
    seed: int = setting(0, least=0, most=2**32 - 1)
    crop: bool = True
    face_detector: str = setting("auto", FACE_DETECTORS)
    face: str = "largest"
    guidance: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_face(self.face)
        if "[V]" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}; it must hold [V], which stands for the person")
        if not self.token.strip():
            raise ValueError("token is empty; pass a rare word such as sks")
        if self.preservation and not self.class_prompt:
            raise ValueError(
                f"prompt is {self.prompt!r}, of which nothing is left without the person; say what the person is, as "
                "in 'a [V] face', or set preservation to 0"
            )
        _ = self.theta_fit, self.lora_fit  # they check the rest

    @property
    def trigger(self) -> str:
        """The prompt that calls the person up, e.g. ``a sks face``."""
        return self.prompt.replace("[V]", self.token)

    @property
    def class_prompt(self) -> str:
        """The prompt without the person, e.g. ``a face``."""
        return " ".join(self.prompt.replace("[V]", "").split())

    @property
    def recognises(self) -> bool:
        """Whether the finetuning needs a network that recognises people."""
        return bool(self.likeness and self.steps)

    @property
    def theta_fit(self) -> FitConfig:
        return self._fit(self.theta_steps, self.theta_lr, self.seed)

    @property
    def lora_fit(self) -> FitConfig:
        own = {name: getattr(self, name) for name in ("max_timestep", "likeness", "guidance")}
        return self._fit(self.steps, self.lr, self.seed + 1, **own)

    def _fit(self, steps: int, lr: float, seed: int, **own: Any) -> FitConfig:
        shared = ("timesteps_per_step", "background", "preservation", "preserved", "max_grad_norm", "optimizer",
                  "gradient_checkpointing", "graph")  # fmt: skip
        return FitConfig(steps, lr, seed=seed, **own, **{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class PreoptimizeConfig:
    """Settings for fitting a theta to each person in a data set.

    Attributes:
        recipe: its LiDB fit, prompt and cropping apply to everybody.
        batch_size: people fitted at once; None is as many as fit into the GPU's memory, or a few on a CPU.
    """

    recipe: PersonalizeConfig = PersonalizeConfig(theta_steps=TARGET_STEPS)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.recipe.theta_steps < 1:
            raise ValueError(f"theta_steps is {self.recipe.theta_steps}; choose 1 or more, or nothing would be fitted")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected 1 or more, or None for auto")


@dataclass(frozen=True)
class BaselineConfig:
    """Settings of the baselines: steps and learning rates.

    DreamBooth's are recommended for faces by diffusers' example, Textual Inversion's come from Gal et al. 2023.

    Attributes:
        lora_rank: rank of LoRA DreamBooth.
        inversion_start: word whose embedding Textual Inversion starts from.
        class_pictures: pictures that the base model draws for DreamBooth's prior preservation.
    """

    dreambooth_steps: int = 1200
    dreambooth_lr: float = 2e-6
    lora_steps: int = 800
    lora_lr: float = 1e-4
    lora_rank: int = 4
    inversion_steps: int = 5000
    inversion_lr: float = 5e-3
    inversion_start: str = "face"
    class_pictures: int = 200

    def __post_init__(self) -> None:
        for name in ("dreambooth_steps", "lora_steps", "inversion_steps", "class_pictures", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("dreambooth_lr", "lora_lr", "inversion_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
        seeds: random seeds; each method fits and draws each person once per seed.
        pictures: pictures per prompt; diversity needs at least 2.
        num_steps: sampling steps per picture.
        people: evaluate at most this many people. None is all.
        batch_size: people our own methods fit at once.
    """

    seeds: int = setting(1, least=1)
    pictures: int = setting(2, least=1)
    num_steps: int = setting(30, least=1)
    people: int | None = setting(None, least=2)
    batch_size: int = setting(1, least=1)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class StartConfig:
    """Settings for learning a start for finetunings.

    Attributes:
        rounds: rounds; each finetunes some people from the current start and then moves it towards their results.
        people: people per round.
        inner_steps: finetuning steps per person and round.
        rate: how far the start moves in the first round, 1 being all the way to the mean; decays linearly to 0.
        seed: random seed for the noise and the choice of people in each round.
    """

    rounds: int = setting(50, least=1)
    people: int = setting(16, least=1)
    inner_steps: int = setting(10, least=1)
    rate: float = setting(1.0, above=0, most=1)
    seed: int = setting(0, least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        check_settings(self)

    def inner_fit(self, fit: FitConfig, number: int) -> FitConfig:
        """The fit of round ``number``: like ``fit``, but with fewer steps and its own noise."""
        return replace(fit, steps=self.inner_steps, seed=self.seed * 1_000_003 + number)


@dataclass(frozen=True)
class NetworkConfig:
    """Settings of a new hypernetwork; `hypernet.network.config.HyperNetworkConfig` is its full config.

    Attributes:
        encoder: vision transformer that encodes the photos, an id or a folder.
        adapt: layers whose LiDB weights are predicted: those of the ``denoiser``, or ``all``, which includes the text
            encoders, as the paper's do. Predicted text encoders forget prompts.
        train_encoder: train the encoder too.
        learned_bases: learn the bases too, which everybody shares.
        k: number of refinements of each prediction, the paper's k.
        hidden_size: width of the decoder.
        num_hidden_layers: layers of the decoder.
        num_attention_heads: attention heads of the decoder; must divide its width.
    """

    encoder: str = DEFAULT_ENCODER
    adapt: str = setting("denoiser", ("denoiser", "all"))
    train_encoder: bool = False
    learned_bases: bool = False
    k: int = setting(4, least=1)
    hidden_size: int = setting(1024, least=1)
    num_hidden_layers: int = setting(2, least=1)
    num_attention_heads: int = setting(16, least=1)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TrainConfig:
    """Settings for training a hypernetwork.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate.
        warmup_steps: steps over which the learning rate rises linearly to its peak.
        lr_scheduler: how the learning rate decays to zero, ``cosine`` or ``linear``.
        batch_size: people per process in each forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        optimizer: optimizer to use: ``adamw`` or ``adamw8bit``, which requires bitsandbytes; ``auto`` is ``adamw``.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: decay of the exponential moving average of the weights, such as 0.9999; the average is then what is
            validated, drawn with and saved. 0 is off.
        denoising: weight of the denoising loss (the paper's alpha); 0 is off.
        target_distance: weight of the distance between predictions and targets (the paper's beta), which requires
            targets; 0 is off.
        preservation: weight of prompt preservation; 0 is off. See `hypernet.fitting.preservation`.
        compare: what to compare with the targets: the ``updates`` to the base model's weights, or the ``factors``,
            theta itself.
        deep_supervision: apply the loss to every refinement of a prediction, not only to the last.
        timesteps_per_step: noisy copies of each photo per step.
        background: weight of the photo's background in the loss; the head has weight 1.
        preserved: prompt whose effect is preserved; ``{}`` stands for the person.
        same_photo: denoise the same photo that the encoder sees, even if a person has several.
        flip: mirror half of the photos at random.
        jitter: crop up to this fraction off a photo's sides at random.
        caption_dropout: fraction of the steps that use an empty prompt.
        validation: fraction of the people to hold out.
        crop: find each face and crop to it; otherwise crop the centre square of the photo.
        face_detector: face detector: ``yunet``, downloaded (233 KB) from the Hugging Face hub on first use, or OpenCV
            4's ``cascade``, which misses more faces; ``auto`` is ``yunet`` if available.
        face: which face to use in a photo of several people: the ``largest`` clear one, ``leftmost``, ``rightmost``,
            or its number from the left, starting at 1.
        seed: random seed for the order of people, the noise and who is held out.
        gradient_checkpointing: save memory at the cost of speed; ``auto`` turns it on if a step would not fit into GPU
            memory.
        log_every: steps between log lines.
        checkpoint_every: steps between checkpoints, each with a validation and sample pictures.
        num_workers: processes that decode photos; 0 decodes in the training process.
        cache: prepare the photos once, as ``hdb prepare`` does, in the Hugging Face cache (``HF_ASSETS_CACHE``, at most
            20 GB); otherwise every run finds the faces again.
    """

    steps: int = setting(20_000, least=1)
    lr: float = setting(1e-4, above=0)
    warmup_steps: int = setting(200, least=0)
    lr_scheduler: str = setting("cosine", ("cosine", "linear"))
    batch_size: int = setting(4, least=1)
    gradient_accumulation_steps: int = setting(1, least=1)
    optimizer: str = setting("adamw", OPTIMIZERS)
    weight_decay: float = setting(0.01, least=0)
    max_grad_norm: float = setting(1.0, above=0)
    ema_decay: float = setting(0.0, least=0, below=1)
    denoising: float = setting(1.0, least=0)
    target_distance: float = setting(0.0, least=0)
    preservation: float = setting(0.0, least=0)
    compare: str = setting("updates", ("updates", "factors"))
    deep_supervision: bool = False
    timesteps_per_step: int = setting(1, least=1)
    background: float = setting(1.0, least=0)
    preserved: tuple[str, ...] = PRESERVED
    same_photo: bool = False
    flip: bool = False
    jitter: float = setting(0.0, least=0, below=1)
    caption_dropout: float = setting(0.0, least=0, below=1)
    validation: float = setting(0.02, least=0, below=1)
    crop: bool = True
    face_detector: str = setting("auto", FACE_DETECTORS)
    face: str = "largest"
    seed: int = setting(0, least=0, most=2**32 - 1)
    gradient_checkpointing: str = setting("auto", AUTO)
    log_every: int = setting(10, least=1)
    checkpoint_every: int = setting(500, least=1)
    num_workers: int = setting(4, least=0)
    cache: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_face(self.face)
        if not self.denoising and not self.target_distance:
            raise ValueError(
                "denoising and target_distance are both 0; nothing would be learned: choose at least one above 0"
            )
        _check_preserved(self)

    @property
    def augments(self) -> bool:
        """Whether photos are augmented differently at each step."""
        return self.flip or self.jitter > 0

    @property
    def needs_base(self) -> bool:
        """Whether a loss term runs the base model; comparing weights alone does not."""
        return self.denoising > 0 or self.preservation > 0
