"""Samplers by Automatic1111's names, as diffusers' schedulers with the options that make them draw alike."""

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

_KARRAS = " Karras"
_LINEAR = {"timestep_spacing": "linspace"}  # k-diffusion's, whose samplers these are
# DDIM and PLMS step through every so many timesteps from the second on, and end at the first one's alpha.
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
_SECOND_ORDER = {"solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero", "euler_at_final": False}
# Its B(h) = h is infinite at a sigma of 0, so that it ends at the smallest, as UniPC's authors do.
_THIRD_ORDER = {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", _LINEAR),
    "Euler a": ("EulerAncestralDiscreteScheduler", _LINEAR),
    "LMS": ("LMSDiscreteScheduler", _LINEAR),
    "Heun": ("HeunDiscreteScheduler", _LINEAR),
    "DPM2": ("KDPM2DiscreteScheduler", _LINEAR),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", _LINEAR),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _LINEAR | _SECOND_ORDER | {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _LINEAR | _SECOND_ORDER | {"algorithm_type": "sde-dpmsolver++"}),
    "DDIM": ("DDIMScheduler", _LEADING | {"clip_sample": False}),
    "PLMS": ("PNDMScheduler", _LEADING | {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", _LINEAR | _THIRD_ORDER),
}
_WITH_KARRAS = ("Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2M", "DPM++ 2M SDE")
SAMPLERS = (*_SAMPLERS, *(name + _KARRAS for name in _WITH_KARRAS))
"""Names of all samplers."""


def check_sampler(name: str) -> str:
    """Return the name as it is spelled in `SAMPLERS`, whatever its case.

    Raises:
        ValueError: there is no such sampler.
    """
    known = {spelled.lower(): spelled for spelled in SAMPLERS}
    found = known.get(name.strip().lower())
    if found is None:
        (nearest,) = difflib.get_close_matches(name.lower(), known, 1, 0)
        raise ValueError(
            f"there is no sampler {name!r}; did you mean {known[nearest]!r}? There are {', '.join(SAMPLERS)}"
        )
    return found


def make_sampler(own: "SchedulerMixin", name: str | None) -> "SchedulerMixin":
    """Make the sampler ``name`` for a base whose scheduler is ``own``, from whose noise schedule nothing changes.

    Raises:
        ValueError: there is no such sampler, or the base cannot be drawn with it.
    """
    import diffusers

    if name is None or check_sampler(name) == sampler_name(own):
        return own
    name = check_sampler(name)
    kind, options = _SAMPLERS[name.removesuffix(_KARRAS)]
    scheduler = getattr(diffusers, kind)
    if scheduler not in own.compatibles:
        raise ValueError(
            f"the sampler {name} does not draw with this base, whose {type(own).__name__} has another kind of noise; "
            f"leave --sampler out"
        )
    if name.endswith(_KARRAS):
        options = options | {"use_karras_sigmas": True}
    return scheduler.from_config(own.config, **options)


def sampler_name(scheduler: "SchedulerMixin") -> str:
    """What Automatic1111 calls a scheduler; diffusers' own name where it has none."""
    kind = type(scheduler).__name__
    if kind == "FlowMatchEulerDiscreteScheduler":
        return "Euler"
    algorithm = scheduler.config.get("algorithm_type")
    same = [name for name, (own, options) in _SAMPLERS.items() if own == kind
            and options.get("algorithm_type", algorithm) == algorithm]  # fmt: skip
    if not same:
        return kind
    karras = scheduler.config.get("use_karras_sigmas") and same[0] in _WITH_KARRAS
    return same[0] + _KARRAS * bool(karras)
