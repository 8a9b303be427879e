"""Makes PEFT know LiDB: entries in its prefix, config and tuner mappings.

PEFT has no hook for methods from outside: ``register_peft_method`` demands a member of its own enum. The mappings are
keyed by strings, so a member of our ``str`` enum works, through pickling, JSON and ``from_pretrained``.
"""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import LiDBConfig, LiDBPeftType
from .model import LiDBModel


def register() -> None:
    """Register LiDB with PEFT; doing it twice changes nothing.

    Raises:
        RuntimeError: another method already has the name.
    """
    name: Any = LiDBPeftType.LIDB  # PEFT says that its keys are members of its own enum
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(name, LiDBConfig)
    if known.__name__ != LiDBConfig.__name__:
        raise RuntimeError(f"PEFT already has a method called LIDB ({known.__name__}); remove the other package")
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = LiDBModel.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = LiDBConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = LiDBModel
