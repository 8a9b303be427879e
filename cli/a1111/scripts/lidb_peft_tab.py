"""The tab lidb-peft: photos in, a LoRA in the webui's own folder out."""

from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from lidb_peft_process import Hdb, file_name
from modules import call_queue, script_callbacks, sd_models, shared, ui_extra_networks
from modules.ui_common import create_refresh_button
from PIL import Image

_CONSENT = "I make LoRAs only of myself, or of people who have agreed to that and to how they will be used."
_SHOWN_LINES = 30
_MINIATURE = "testbed"
HDB = Hdb()


def lora_folder() -> Path:
    """Where the webui looks for LoRAs."""
    return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(shared.models_path) / "Lora")


def checkpoint_titles() -> "list[str]":
    """What the webui calls its checkpoints; and the miniature that ships with lidb-peft."""
    return [*sd_models.checkpoints_list, _MINIATURE]


def checkpoint_file(title: str) -> str:
    """The file of a checkpoint; raises ValueError if the webui has none of that title."""
    if title == _MINIATURE:
        return title
    info = sd_models.checkpoint_aliases.get(title)  # titles change when hashes become known; the old ones stay here
    if info is None:
        raise ValueError("no checkpoint is chosen; choose the one that the LoRA is for")
    return info.filename


def personalize(photos, checkpoint, name, steps, seed, find_face, consent):
    """Make a LoRA; yields what to show of it: the lines so far, and the preview picture at the end."""
    lines = []
    try:
        if not consent:
            raise ValueError("tick the box first: make a LoRA only of yourself, or of somebody who has agreed to it")
        if not photos:
            raise ValueError("there is no photo; drop at least one")
        out = free_file(lora_folder(), file_name(name))
        arguments = hdb_arguments(photos, checkpoint_file(checkpoint), out, steps, seed, find_face)
        run = HDB.start(arguments, webui_waits())
        yield "starting, after the pictures that the webui is drawing", None
        for lines in run.watch():
            yield last_of(lines), None
        yield last_of([*lines, f"saved {out}"]), preview_of(out)
    except ValueError as error:
        yield str(error).replace("pass --no-crop", 'untick "Find the face"'), None


def hdb_arguments(photos, base: str, out: Path, steps, seed, find_face: bool) -> "list[str]":
    """The command that hdb is run with; photos are names, or what has one, as each version of Gradio has it."""
    paths = [str(getattr(photo, "name", photo)) for photo in photos]
    arguments = ["personalize", *paths, "--base", base, "--out", str(out), "--seed", str(int(seed or 0))]
    return arguments + (["--steps", str(int(steps))] if steps else []) + ([] if find_face else ["--no-crop"])


def last_of(lines: "list[str]") -> str:
    return "\n".join(lines[-_SHOWN_LINES:])


def preview_of(lora: Path) -> "Image.Image | None":
    """The picture beside a LoRA: itself, for Gradio serves no files from folders that it was not told of."""
    file = lora.with_suffix(".png")
    if not file.exists():
        return None
    with Image.open(file) as picture:
        return picture.copy()


@contextmanager
def webui_waits():
    """The webui draws nothing and its model is off the card: two at once are more than most cards hold."""
    with call_queue.queue_lock:
        model = sd_models.model_data.sd_model
        if model is not None:
            sd_models.unload_model_weights(model)
        try:
            yield
        finally:
            if model is not None:
                sd_models.send_model_to_device(model)
            refresh()


def free_file(folder: Path, name: str) -> Path:
    """A file in the folder that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    number, file = 1, folder / f"{name}.safetensors"
    while file.exists():
        number += 1
        file = folder / f"{name}-{number}.safetensors"
    return file


def refresh() -> None:
    """Let the webui see the new file, as its own Refresh button does."""
    for page in ui_extra_networks.extra_pages:
        page.refresh()


def on_ui_tabs():
    """The tab, as the webui asks for it."""
    with gr.Blocks(analytics_enabled=False) as tab:
        consent = gr.Checkbox(False, label=_CONSENT)
        with gr.Row():
            with gr.Column():
                photos = gr.File(label="Photos of one person", file_count="multiple", file_types=["image"])
                with gr.Row():
                    titles = checkpoint_titles()
                    checkpoint = gr.Dropdown(titles, value=titles[0], label="Checkpoint")
                    create_refresh_button(
                        checkpoint, sd_models.list_models, lambda: {"choices": checkpoint_titles()}, "lidb_peft_refresh"
                    )
                name = gr.Textbox("me", label="Name of the LoRA")
                steps = gr.Number(0, label="Steps (0: as many as the recipe has)", precision=0)
                seed = gr.Number(0, label="Seed", precision=0)
                find_face = gr.Checkbox(True, label="Find the face")
                with gr.Row():
                    start = gr.Button("Start", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                said = gr.Textbox(label="Progress", lines=16, interactive=False)
                picture = gr.Image(label="Preview", type="pil", interactive=False)
        start.click(personalize, [photos, checkpoint, name, steps, seed, find_face, consent], [said, picture])
        stop.click(HDB.stop, [], [])
    return [(tab, "lidb-peft", "lidb_peft_tab")]


script_callbacks.on_ui_tabs(on_ui_tabs)
