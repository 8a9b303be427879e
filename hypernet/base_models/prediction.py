"""Whether a Stable Diffusion predicts the noise (epsilon) or the velocity (v), read from the model or measured.

A folder's scheduler config says it. A single file may say it in its metadata or by a tensor that ComfyUI and
Automatic1111 read. Otherwise it is measured: given pure noise, a UNet that predicts noise must return it, and one that
predicts v returns its guess of the picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from converters.metadata import stated_v_prediction
from lidb_peft.families import Family

EPSILON, V = "epsilon", "v_prediction"
NAMES = {"epsilon": EPSILON, "v": V}
"""What options call them -> what diffusers' schedulers do."""
HAS_ZERO_SNR = "ztsnr"
"""An empty tensor by which a model says that it was trained on noise alone at the last timestep."""
NOISE_RETURNED = 0.5
"""If the prediction for pure noise correlates with that noise more than this, the model predicts noise."""
_PREDICTS_V = "v_pred"


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicts, as diffusers' schedulers call it, and how that is known."""

    type: str
    reason: str


def short_name(prediction_type: str) -> str:
    """What options call it."""
    return next(name for name, found in NAMES.items() if found == prediction_type)


def stated_prediction(tensors: Mapping[str, object], metadata: Mapping[str, str], family: Family) -> Prediction | None:
    """What a single file says that it predicts; None if it says nothing."""
    if _PREDICTS_V in tensors:
        return Prediction(V, f"its tensor {_PREDICTS_V} says so")
    predicts_v = stated_v_prediction(metadata)
    if predicts_v is not None:
        return Prediction(V if predicts_v else EPSILON, "its metadata say so")
    types = {
        version.prediction_type
        for version in family.versions
        if version.architecture == metadata.get("modelspec.architecture")
    }
    return Prediction(types.pop(), "its architecture in the metadata says so") if len(types) == 1 else None


def measured_prediction(correlation: float) -> Prediction:
    """What a UNet predicts whose prediction of noise alone has this correlation with that noise."""
    predicts_noise = correlation > NOISE_RETURNED
    return Prediction(
        EPSILON if predicts_noise else V,
        f"measured, for nothing says it: asked of noise alone it {'returns' if predicts_noise else 'does not return'} "
        f"it, correlation {correlation:.2f}",
    )
