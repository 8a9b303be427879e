"""The training corpus of the miniature: drawn portraits with captions, and a CLIP tokenizer for their words."""

import json
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from testbed.drawing import draw
from testbed.portraits import CLOTHES, SPLITS, STYLE_WORDS, caption, identity, random_scene

MAX_TOKENS = 32
EXTRA_SENTENCES = (
    "a portrait of a person, a man, a woman, a smiling face, the face of someone",
    "a drawing in the style of, an oil painting, a sketch, a picture of a head and shoulders",
    "in space, in a room, in a garden, with blue eyes, with green eyes, with brown eyes, with freckles",
)


def portrait(index: int, split: str = "train", size_px: int = 32) -> tuple[np.ndarray, str]:
    """Portrait ``index`` of a split with its caption: ``(size_px, size_px, 3)`` uint8 and a string."""
    rng = np.random.default_rng((index, SPLITS[split].start))
    who = identity(int(rng.integers(SPLITS[split].start, SPLITS[split].stop)))
    scene = random_scene(rng)
    return draw(who, scene, size_px), caption(who, scene, rng)


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train CLIP's byte-pair encoding on the captions with `tokenizers` and save it in CLIP's own two files."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    sentences = [*captions, *EXTRA_SENTENCES, *CLOTHES, *(style.format("a face") for style in STYLE_WORDS.values())]
    tokenizer.train_from_iterator((sentence.lower() for sentence in sentences), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]

    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens.
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    clip = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )
    clip.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
