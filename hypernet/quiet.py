"""Loading and saving models without transformers' and diffusers' warnings and bars; their loggers stay the user's."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers and diffusers from warning and from showing bars in a block; downloads keep theirs.

    They warn of a torchvision that nothing here needs, and count weights that load or are written in a moment. Whoever
    has asked one of them for more than its default, ``info`` or ``debug``, gets that.
    """
    with ExitStack() as libraries:
        for name in ("transformers", "diffusers"):
            libraries.enter_context(_quiet(import_module(f"{name}.utils.logging")))
        yield


@contextmanager
def without_data_set_bars() -> Iterator[None]:
    """Keep datasets from showing bars in a block, of what is read in a moment."""
    import datasets

    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Keep diffusers from logging anything in a block: of a LoRA it logs an error for every layer that does not fit."""
    from diffusers.utils import logging as library

    verbosity = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Let one library log errors only for a block, and switch its bars off."""
    verbosity = library.get_verbosity()
    if verbosity < logging.WARNING:
        yield
        return
    had_bars = library._tqdm_active  # diffusers 0.32 has no function that tells
    library.set_verbosity(max(verbosity, logging.ERROR))
    if had_bars:
        _switch_bars(library, on=False)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if had_bars:
            _switch_bars(library, on=True)


def _switch_bars(library: ModuleType, on: bool) -> None:
    """Switch a library's own bars; transformers switches those of the hub's downloads too, which stay as they are."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_downloads = not are_progress_bars_disabled()
    (library.enable_progress_bar if on else library.disable_progress_bar)()
    if are_progress_bars_disabled() == had_downloads:
        (enable_progress_bars if had_downloads else disable_progress_bars)()
