"""LoRA files: names, metadata, writing and reading kohya's format, and describing anybody's."""

from .describe import FileDescription, describe
from .formats import FORMATS, Conversion, detect_format, prepare_conversion
from .kohya import load_kohya, save_kohya, write_lora
from .lora import Lora, LoraLayer
from .metadata import KohyaMetadata
from .reading import read_lora

__all__ = [
    "FORMATS",
    "Conversion",
    "FileDescription",
    "KohyaMetadata",
    "Lora",
    "LoraLayer",
    "describe",
    "detect_format",
    "load_kohya",
    "prepare_conversion",
    "read_lora",
    "save_kohya",
    "write_lora",
]
