"""Lightweight DreamBooth (HyperDreamBooth, arXiv:2307.06949, section 4.1) as a PEFT method.

Importing this package registers LiDB with PEFT; do so before ``PeftModel.from_pretrained`` on a LiDB adapter.
"""

from importlib.metadata import PackageNotFoundError, version

from .config import LiDBConfig
from .distance import squared_distance
from .layer import LiDBLayer, LiDBLinear
from .model import LiDBModel
from .pipelines import load_adapter, save_adapter
from .projection import project_lora
from .record import base_fingerprint, check_record, record_config, space_record
from .registration import register
from .relax import LoraFactors, combine, peft_factors, relax
from .space import LiDBSpace
from .theta import ThetaFile, load_theta, save_theta

register()

try:
    __version__ = version("lidb-peft")
except PackageNotFoundError:  # a clone on the path
    __version__ = "0+not.installed"

__all__ = [
    "LiDBConfig",
    "LiDBLayer",
    "LiDBLinear",
    "LiDBModel",
    "LiDBSpace",
    "LoraFactors",
    "ThetaFile",
    "base_fingerprint",
    "check_record",
    "combine",
    "load_adapter",
    "load_theta",
    "peft_factors",
    "project_lora",
    "record_config",
    "relax",
    "save_adapter",
    "save_theta",
    "space_record",
    "squared_distance",
]
