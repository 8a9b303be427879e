"""The page as a whole: what its tabs share, what it serves, and starting it."""

import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.web.fitting import Bases
from cli.web.jobs import Jobs
from cli.web.work_folder import WorkFolder
from hypernet.recipe import DEFAULT_BASE

if TYPE_CHECKING:
    from hypernet.base_models.base import BaseModel

MISSING = "the page needs Gradio, which is not installed; run pip install 'gradio>=6.2,<7'"
LOCALHOST = "127.0.0.1"
_LARGEST_UPLOAD = "2gb"  # LoRAs of FLUX.1 are as large; a photo of more than 560 MB of pixels is refused when read
_UPLOADS_KEPT_S = 24 * 3600
_CONSENT = "I make LoRAs only of myself, or of people who have agreed to that and to how they will be used."


@dataclass
class Page:
    """What the tabs share.

    Attributes:
        base: the base model that is chosen at first.
        is_local: nobody but this machine sees the page; only then does it open or write paths that are typed in.
        blocks: Gradio's page, once it is being built.
    """

    folder: WorkFolder
    bases: Bases
    base: str = DEFAULT_BASE
    is_local: bool = True
    jobs: Jobs = field(default_factory=Jobs)
    blocks: Any = None


def build(page: Page) -> Any:
    """Return Gradio's Blocks.

    Raises:
        ValueError: Gradio is not installed.
    """
    gr = _gradio(page.folder)
    from cli.web.files_tab import add_files_tab
    from cli.web.people_tab import add_people_tab
    from cli.web.personalize_tab import add_personalize_tab

    with gr.Blocks(title="lidb-peft", analytics_enabled=False, delete_cache=(3600, _UPLOADS_KEPT_S)) as page.blocks:
        gr.HTML('<h1>lidb-peft</h1><p class="hdb-sub">Photos in, a standard LoRA out.</p>', elem_id="head")
        consent = gr.Checkbox(False, label=_CONSENT, elem_id="consent")
        with gr.Tab("One person", id="personalize"):
            add_personalize_tab(page, consent)
        with gr.Tab("Many people", id="people"):
            add_people_tab(page, consent)
        with gr.Tab("LoRA files", id="files"):
            add_files_tab(page)
    page.blocks.queue(default_concurrency_limit=4, max_size=100)
    return page.blocks


def launch(
    work_dir: str | Path,
    open_base: "Callable[[str], BaseModel]",
    base: str = DEFAULT_BASE,
    host: str = LOCALHOST,
    port: int = 7860,
    in_browser: bool = False,
    wait: bool = True,
) -> str:
    """Serve the page; returns its address, when it is closed or, without ``wait``, at once.

    Args:
        work_dir: the only folder that files are served from; uploads and results are in it.
        open_base: loads what somebody has chosen.
        host: who may see the page: 127.0.0.1 is this machine alone.
        port: 0 takes any that is free.

    Raises:
        ValueError: Gradio is not installed, or the port is in use.
        OSError: the work folder cannot be written.
    """
    port = check_port(host, port)
    page = Page(WorkFolder(work_dir), Bases(open_base), base, host in (LOCALHOST, "localhost", "::1"))
    blocks = build(page)
    import gradio as gr
    from starlette.middleware import Middleware

    from cli.web.uploads import RoomForUploads

    logging.getLogger("httpx").setLevel(logging.WARNING)
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]  # nothing is fetched
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=["monospace"]).set(
        checkbox_border_color="*neutral_400", input_border_width="1px", input_border_color="*neutral_300",
        body_text_color_subdued="*neutral_500",
    )  # fmt: skip
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, inbrowser=in_browser, prevent_thread_lock=not wait, quiet=True,
        allowed_paths=[str(page.folder.path)], max_file_size=_LARGEST_UPLOAD, footer_links=["api"], ssr_mode=False,
        theme=theme, css_paths=Path(__file__).with_name("page.css"), show_error=True, share=False,
        app_kwargs={"middleware": [Middleware(RoomForUploads, folder=page.folder.uploads)]},
    )  # fmt: skip
    return address


def check_port(host: str, port: int) -> int:
    """Return the port, a free one for 0.

    Raises:
        ValueError: it cannot be had.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} is in use, perhaps by another hdb ui; close that, or pass --port {port + 1}"
            else:
                reason = f"the page cannot be served at {host}:{port}: {error.strerror or error}; pass another --host"
            raise ValueError(reason) from error
        return probe.getsockname()[1]


def _gradio(folder: WorkFolder) -> Any:
    """Import Gradio, with what it may do set before it is: no word to anybody, uploads in the work folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder.uploads)
    try:
        import gradio
    except ImportError as error:
        raise ValueError(MISSING) from error
    return gradio
