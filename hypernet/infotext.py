"""What a picture was drawn with, as Automatic1111 writes it into a PNG: the text ``parameters``.

The prompt, a line ``Negative prompt: ...``, and a line ``Steps: 30, Sampler: Euler a, ...`` whose values are quoted as
JSON where they hold a comma, a colon or a line break. A1111, Forge, Civitai and most viewers read it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

PNG_KEY = "parameters"
_NEGATIVE = "Negative prompt:"
_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_FIELDS = 3  # of a last line that is no part of the prompt
_LONGEST = 1_000_000  # characters; nobody's prompt


@dataclass(frozen=True)
class Infotext:
    """What a picture was drawn with.

    Attributes:
        fields: the settings by A1111's names, such as ``Steps`` and ``CFG scale``, in their order.
    """

    prompt: str
    negative: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        negative = f"\n{_NEGATIVE} {self.negative}" if self.negative else ""
        settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in self.fields.items())
        return f"{self.prompt}{negative}\n{settings}".strip()


def read_infotext(text: str) -> Infotext:
    """Take A1111's text apart; what is missing of it is empty."""
    *lines, last = text.strip().split("\n")
    found = _FIELD.findall(last)
    if len(found) < _FEWEST_FIELDS:
        lines, found = [*lines, last], []
    begins = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt, negative = (("\n".join(part)).strip() for part in (lines[:begins], lines[begins:]))
    fields = {name: _unquoted(value.strip()) for name, value in found}
    return Infotext(prompt, negative.removeprefix(_NEGATIVE).strip(), fields)


def read_picture(path: str | Path) -> Infotext | None:
    """What a PNG says it was drawn with; None if it says nothing.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(PNG_KEY)
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable PNG") from error
    return read_infotext(text) if isinstance(text, str) and len(text) < _LONGEST else None


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & {",", ":", "\n"} else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text
