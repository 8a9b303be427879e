"""CLIP's tokenizer, which Stable Diffusion's text encoders and OpenCLIP's read prompts by, without the hub.

Its merges ship with this package (``clip/``, MIT); the vocabulary follows from them: the bytes, the bytes that end a
word, the merges in their order, and the two marks (openai/CLIP, ``clip/simple_tokenizer.py``).
"""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77
VOCABULARY_SIZE = 49_408
_MERGES = Path(__file__).with_name("clip") / "merges.txt"
_END_OF_WORD = "</w>"


def clip_tokenizer(pad_token: str = END) -> "CLIPTokenizer":
    """Return CLIP's tokenizer, as the model's folder on the hub has it.

    Args:
        pad_token: what prompts are filled up with: CLIP's own, or ``!`` for encoders of OpenCLIP.
    """
    from transformers import CLIPTokenizer

    with TemporaryDirectory() as folder:  # which every version of transformers reads
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
        Path(folder, "merges.txt").write_bytes(_MERGES.read_bytes())
        return CLIPTokenizer.from_pretrained(
            folder, bos_token=START, eos_token=END, unk_token=END, pad_token=pad_token, model_max_length=MAX_TOKENS
        )


@cache
def vocabulary() -> dict[str, int]:
    """Every token and its id."""
    merges = [line.replace(" ", "") for line in _MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    letters = _letters()
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *merges, START, END]
    return {token: index for index, token in enumerate(tokens)}


def _letters() -> list[str]:
    """The 256 bytes as letters, the printable ones first, the others from U+0100 on (GPT-2's, which CLIP took over)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\N{INVERTED EXCLAMATION MARK}"), ord("\N{NOT SIGN}") + 1),
                 *range(ord("\N{REGISTERED SIGN}"), 256)]  # fmt: skip
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
