"""Lightweight DreamBooth (HyperDreamBooth, arXiv:2307.06949, section 4.1) as a PEFT method.

Importing this package registers LiDB with PEFT; do so before ``PeftModel.from_pretrained`` on a LiDB adapter.
"""

from .config import LiDBConfig
from .layer import LiDBLayer, LiDBLinear
from .model import LiDBModel
from .registration import register
from .relax import LoraFactors, combine, peft_factors, relax
from .space import LiDBSpace
from .theta import ThetaFile, base_fingerprint, load_theta, save_theta

register()

__all__ = [
    "LiDBConfig",
    "LiDBLayer",
    "LiDBLinear",
    "LiDBModel",
    "LiDBSpace",
    "LoraFactors",
    "ThetaFile",
    "base_fingerprint",
    "combine",
    "load_theta",
    "peft_factors",
    "relax",
    "save_theta",
]
