"""Makes PEFT know LiDB: entries in its prefix, config and tuner mappings.

PEFT has no hook for methods from outside: ``register_peft_method`` demands a member of its own enum. The mappings are
keyed by strings, so a member of our ``str`` enum works, through pickling, JSON and ``from_pretrained``.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import LiDBConfig, LiDBPeftType
from .model import LiDBModel


def register() -> None:
    """Register LiDB with PEFT; doing it twice changes nothing.

    Raises:
        RuntimeError: another method already has the name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(LiDBPeftType.LIDB, LiDBConfig)
    if known.__name__ != LiDBConfig.__name__:
        raise RuntimeError(f"PEFT already has a method called LIDB ({known.__name__}); remove the other package")
    PEFT_TYPE_TO_PREFIX_MAPPING[LiDBPeftType.LIDB] = LiDBModel.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[LiDBPeftType.LIDB] = LiDBConfig
    PEFT_TYPE_TO_TUNER_MAPPING[LiDBPeftType.LIDB] = LiDBModel
