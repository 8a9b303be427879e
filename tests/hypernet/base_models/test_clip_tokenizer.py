"""CLIP's tokenizer without the hub, beside CLIP's own way of splitting words, written down independently."""

import html
import itertools
from pathlib import Path

import pytest
import regex

from hypernet.base_models.clip_tokenizer import END, START, clip_tokenizer, vocabulary

TEXTS = (
    "a photo of a cat", "a [V] face", "a sks face wearing a crown", "(masterpiece:1.3), best quality, 8k, <lora:me:1>",
    "Ünïcödé, ß and naïve café", "日本語の顔", "\N{PARTY POPPER}\N{FIRE}", "they've we'll I'm it's d'état",
    "1girl, 123 4567", "a_b-c.d/e\\f #tag @me", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "tabs\tand  two  blanks ",
    "supercalifragilisticexpialidocious" * 3,
)  # fmt: skip
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


def reference_ids(text):
    """openai/CLIP's ``SimpleTokenizer.encode``, rank by rank: the earliest merge of any pair first."""
    ids = vocabulary()
    letters = [token for token, index in ids.items() if index < 256]
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    letter_of = dict(zip(order, letters, strict=True))
    found = []
    for piece in PIECES.findall(" ".join(html.unescape(text).split()).lower()):
        parts = [letter_of[byte] for byte in piece.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            joined = [(ids.get(a + b, len(ids)), index) for index, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, index = min(joined, default=(len(ids), 0))
            if rank == len(ids):
                break
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        found += [ids[part] for part in parts]
    return found


def test_the_vocabulary_is_clip_s(tokenizer):
    """Numbers that CLIP's papers and users go by: 256 bytes twice, 48,894 merges, two marks."""
    ids = vocabulary()
    assert len(ids) == 2 * 256 + 48_894 + 2 == 49_408
    assert sorted(ids.values()) == list(range(49_408))
    assert (ids["!"], ids["!</w>"], ids[START], ids[END]) == (0, 256, 49_406, 49_407)
    assert tokenizer.get_vocab() == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (49_406, 49_407, 77)


@pytest.mark.parametrize(
    ("text", "ids"),  # of CLIP's own README and tests
    [("a photo of a cat", [320, 1125, 539, 320, 2368]), ("hello world!", [3306, 1002, 256])],
)
def test_known_prompts_have_their_known_ids(tokenizer, text, ids):
    assert tokenizer(text)["input_ids"] == [49_406, *ids, 49_407]


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_split_as_clip_splits_them(tokenizer, text):
    assert tokenizer(text)["input_ids"][1:-1] == reference_ids(text)


def test_a_text_of_thousands_of_words_is_split_as_clip_splits_it(tokenizer):
    lines = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 100
    for line in lines:
        assert tokenizer(line)["input_ids"][1:-1] == reference_ids(line), line


def test_openclip_s_prompts_are_filled_up_with_exclamation_marks(tokenizer):
    filled, other = (
        made("a face", padding="max_length", max_length=77)["input_ids"] for made in (clip_tokenizer("!"), tokenizer)
    )
    assert filled[:4] == other[:4] == [49_406, 320, 1710, 49_407]
    assert filled[4:] == [0] * 73
    assert other[4:] == [49_407] * 73
