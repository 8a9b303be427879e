"""What the page says of an error: one sentence; the log has the details."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cli.main import as_sentence

LOG = logging.getLogger(__name__)
# How the page calls what the command line calls an option.
_WORDS = {"pass --no-crop": 'untick "Find the face"', "--no-crop": '"Find the face", unticked'}
Function = TypeVar("Function", bound=Callable[..., Any])


def sentence(error: BaseException) -> str:
    """What went wrong, for people; of what is our own fault the kind of error, and that the log has the rest."""
    from hypernet.errors import is_out_of_memory

    if isinstance(error, click.ClickException):
        return in_words_of_the_page(error.message)
    if isinstance(error, OSError | ValueError):
        return in_words_of_the_page(as_sentence(error))
    if is_out_of_memory(error):
        return "out of memory; close other programs, choose a smaller base, or start hdb ui with --max-vram"
    return f"this is a bug in the program ({type(error).__name__}: {as_sentence(error)}); its log has the details"


def in_words_of_the_page(text: str) -> str:
    """A message that names an option of the command line, for people who see a page."""
    for option, words in _WORDS.items():
        text = text.replace(option, words)
    return text


def told(function: Function) -> Function:
    """Make a function of the page raise errors as Gradio shows them: a sentence."""
    import gradio

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except gradio.Error:
            raise
        except Exception as error:
            LOG.info("%s failed", function.__name__, exc_info=error)
            raise gradio.Error(sentence(error), print_exception=False) from error

    return call
