"""LoRA files, whoever made them: read, written, converted, computed with and described."""

from converters.arithmetic.algebra import merge, resize
from converters.arithmetic.checkpoint import extract, merge_into
from converters.arithmetic.ranks import RankRule
from converters.convert import FORMATS, Conversion, detect_format, prepare_conversion, prepare_writing
from converters.formats.kohya import load_kohya, save_kohya, write_lora
from converters.formats.reading import read_lora
from converters.inspection.describe import FileDescription, describe
from converters.layer import LoraLayer
from converters.lora import Lora
from converters.metadata import KohyaMetadata

__all__ = [
    "FORMATS",
    "Conversion",
    "FileDescription",
    "KohyaMetadata",
    "Lora",
    "LoraLayer",
    "RankRule",
    "describe",
    "detect_format",
    "extract",
    "load_kohya",
    "merge",
    "merge_into",
    "prepare_conversion",
    "prepare_writing",
    "read_lora",
    "resize",
    "save_kohya",
    "write_lora",
]
