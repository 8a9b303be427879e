"""The tab lidb-peft: photos in, a LoRA in the webui's own folder out."""

from pathlib import Path

import gradio as gr
from lidb_peft_process import Hdb, file_name
from modules import script_callbacks, sd_models, shared, ui_extra_networks

_CONSENT = "I make LoRAs only of myself, or of people who have agreed to that and to how they will be used."
_SHOWN_LINES = 30
_MINIATURE = "testbed"
HDB = Hdb()


def lora_folder() -> Path:
    """Where the webui looks for LoRAs."""
    return Path(getattr(shared.cmd_opts, "lora_dir", None) or Path(shared.models_path) / "Lora")


def checkpoints() -> "dict[str, str]":
    """What the webui calls its checkpoints -> their files; and the miniature that ships with lidb-peft."""
    return {title: info.filename for title, info in sd_models.checkpoints_list.items()} | {_MINIATURE: _MINIATURE}


def personalize(photos, checkpoint, name, steps, seed, find_face, consent):
    """Make a LoRA; yields what to show of it: the lines so far, and the preview picture at the end."""
    try:
        if not consent:
            raise ValueError("tick the box first: make a LoRA only of yourself, or of somebody who has agreed to it")
        if not photos:
            raise ValueError("there is no photo; drop at least one")
        if checkpoint not in checkpoints():
            raise ValueError("no checkpoint is chosen; choose the one that the LoRA is for")
        out = free_file(lora_folder(), file_name(name))
        paths = [getattr(photo, "name", photo) for photo in (photos if isinstance(photos, list) else [photos])]
        arguments = ["personalize", *map(str, paths), "--base", checkpoints()[checkpoint], "--out", str(out)]
        arguments += ["--seed", str(int(seed or 0)), *(["--steps", str(int(steps))] if steps else [])]
        arguments += [] if find_face else ["--no-crop"]
        sd_models.unload_model_weights()  # two models at once are more than most cards hold
        lines = []
        for line in HDB.run(arguments):
            lines.append(line)
            yield "\n".join(lines[-_SHOWN_LINES:]), None
        refresh()
        picture = out.with_suffix(".png")
        yield "\n".join([*lines, f"saved {out}"][-_SHOWN_LINES:]), str(picture) if picture.exists() else None
    except ValueError as error:
        yield str(error).replace("pass --no-crop", 'untick "Find the face"'), None


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
                names = list(checkpoints())
                checkpoint = gr.Dropdown(names, value=names[0], label="Checkpoint")
                name = gr.Textbox("me", label="Name of the LoRA")
                steps = gr.Number(0, label="Steps (0: as many as the recipe has)", precision=0)
                seed = gr.Number(0, label="Seed", precision=0)
                find_face = gr.Checkbox(True, label="Find the face")
                with gr.Row():
                    start = gr.Button("Start", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                said = gr.Textbox(label="Progress", lines=16, interactive=False)
                picture = gr.Image(label="Preview", type="filepath", interactive=False)
        inputs = [photos, checkpoint, name, steps, seed, find_face, consent]
        start.click(personalize, inputs, [said, picture])
        stop.click(HDB.stop, [], [])
    return [(tab, "lidb-peft", "lidb_peft_tab")]


script_callbacks.on_ui_tabs(on_ui_tabs)
