"""LoRA files: names, metadata, writing and reading kohya's format, and describing anybody's."""

from .describe import FileDescription, describe
from .kohya import load_kohya, save_kohya, write_lora
from .metadata import KohyaMetadata

__all__ = ["FileDescription", "KohyaMetadata", "describe", "load_kohya", "save_kohya", "write_lora"]
