"""The prompts that people are judged by."""

from pathlib import Path

PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
"""30 for faces: styles and recontextualisations, as the paper's section 5.2 describes them."""


def read_prompts(path: str | Path | None = None) -> tuple[str, ...]:
    """Read prompts, one a line with ``{}`` for the person; empty lines and those that begin with # are passed over.

    Args:
        path: by default `PROMPTS_FILE`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, holds no prompt or one twice, or a prompt lacks ``{}``.
    """
    path = Path(path or PROMPTS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; name a text file with a prompt in each line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8; write a prompt in each line") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    without = [prompt for prompt in prompts if prompt.count("{}") != 1 or set("{}") & set(prompt.replace("{}", ""))]
    if not prompts or without:
        found = f"the prompt {without[0]!r}" if without else "no prompt"
        raise ValueError(f"{path} has {found}; write prompts with one {{}}, which stands for the person")
    twice = [prompt for prompt in prompts if prompts.count(prompt) > 1]
    if twice:
        raise ValueError(f"{path} has the prompt {twice[0]!r} twice; leave one out")
    return prompts
