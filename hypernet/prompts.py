"""What a base does not read of a prompt: words behind its last token, and Automatic1111's own syntax."""

import re
import warnings
from collections.abc import Iterable

from hypernet.base_models.base import BaseModel
from lidb_peft.safe_read import printable

_WEIGHT = r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*"
_A1111_SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>]*>"
    rf"|\([^()]*:{_WEIGHT}\)"  # (word:1.2)
    r"|\(\([^()]*\)\)"  # ((word))
    rf"|\[[^\[\]]*:{_WEIGHT}\]"  # [from:to:0.5]
    r"|\[[^\[\]|]*\|[^\[\]]*\]"  # [one|other]
    r"|\b(?:BREAK|AND)\b"
)


def check_trained_prompt(base: BaseModel, prompt: str, token: str) -> None:
    """Refuse a prompt to train with that loses its token, or that only Automatic1111 understands; warn of cut words.

    Raises:
        ValueError: the token is cut off, or the prompt has Automatic1111's syntax.
    """
    syntax = _A1111_SYNTAX.search(prompt)
    if syntax:
        raise ValueError(f"the prompt has {printable(syntax[0])}, Automatic1111's own syntax, which would be trained "
                         f"as words; leave it out, and write it there")  # fmt: skip
    for kept, cut in _cut(base, prompt):
        if token.replace(" ", "").lower() not in kept.replace(" ", "").lower():
            raise ValueError(f"the prompt is longer than {base.name} reads, and its token {token!r} is cut off; make "
                             f"it shorter")  # fmt: skip
        _warn(base, prompt, cut)


def warn_of_prompts(base: BaseModel, prompts: Iterable[str]) -> None:
    """Warn of what a picture will not show of its prompt."""
    for prompt in prompts:
        syntax = _A1111_SYNTAX.search(prompt)
        if syntax:
            warnings.warn(
                f"{printable(syntax[0])} is Automatic1111's own syntax; here it is read as words", stacklevel=2
            )
        for _, cut in _cut(base, prompt):
            _warn(base, prompt, cut)


def _warn(base: BaseModel, prompt: str, cut: str) -> None:
    warnings.warn(
        f"the prompt {printable(prompt, 40)!r} is longer than {base.name} reads; {printable(cut)!r} is cut off",
        stacklevel=3,
    )


def _cut(base: BaseModel, prompt: str) -> list[tuple[str, str]]:
    """What is kept and what is cut off of a prompt that is too long; nothing of others, or where that is unknown."""
    tokenizers = [getattr(base, name, None) for name in ("tokenizer", "tokenizer_2")]
    tokenizer = max(filter(None, tokenizers), key=lambda one: one.model_max_length, default=None)
    if tokenizer is None:
        return []
    ids, most = tokenizer(prompt, verbose=False)["input_ids"], tokenizer.model_max_length
    if len(ids) <= most:
        return []
    return [(tokenizer.decode(ids[1 : most - 1]), tokenizer.decode(ids[most - 1 : -1]))]
