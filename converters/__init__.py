"""LoRA files, whoever made them: read, written, converted, computed with and described."""

from converters.convert import FORMATS, Conversion, detect_format, prepare_conversion
from converters.formats.kohya import load_kohya, save_kohya, write_lora
from converters.formats.reading import read_lora
from converters.inspection.describe import FileDescription, describe
from converters.lora import Lora, LoraLayer
from converters.metadata import KohyaMetadata

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
