"""LoRA files: names, metadata, writing and reading kohya's format, and describing anybody's."""

from .describe import FileDescription, describe
from .formats import read_lora
from .kohya import load_kohya, save_kohya, write_lora
from .lora import Lora, LoraLayer
from .metadata import KohyaMetadata

__all__ = [
    "FileDescription",
    "KohyaMetadata",
    "Lora",
    "LoraLayer",
    "describe",
    "load_kohya",
    "read_lora",
    "save_kohya",
    "write_lora",
]
