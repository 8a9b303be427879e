"""The third tab: what LoRA files hold, and other files made of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.convert import FORMATS
from cli.inspect import as_text
from cli.results import what_is_missed
from cli.web.sentences import told
from cli.web.status import HOW_TO_FILES

if TYPE_CHECKING:
    from cli.web.app import Page

MOST_FILES = 20
_SUFFIX = ".safetensors"


def add_files_tab(page: "Page") -> None:
    """Build the tab and connect it."""
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            loras = gr.File(label="LoRA files, from any program", file_count="multiple", file_types=[_SUFFIX],
                            elem_id="loras", height=180)  # fmt: skip
            inspect = gr.Button("Inspect", variant="primary")
            with gr.Accordion("Convert", open=False):
                to = gr.Dropdown(FORMATS, value="kohya", label="To format",
                                 info="kohya is what A1111, Forge and ComfyUI read")  # fmt: skip
                trigger = gr.Textbox("", label="Activation text", placeholder="empty: unchanged", max_lines=1)
                convert = gr.Button("Convert each")
            with gr.Accordion("Resize", open=False):
                rank = gr.Slider(1, 128, value=8, step=1, label="Maximum rank of a layer")
                energy = gr.Slider(0, 1, value=0, step=0.01, label="Or keep this fraction of each layer's squared norm",
                                   info="0: only the maximum rank applies")  # fmt: skip
                resize = gr.Button("Resize each")
            with gr.Accordion("Merge", open=False):
                weights = gr.Textbox("", label="Weights, in the order of the files", placeholder="0.8, 0.5; empty: 1",
                                     max_lines=1)  # fmt: skip
                most = gr.Number(0, precision=0, minimum=0, label="Maximum rank", info="0: exact; ranks add up")
                merge = gr.Button("Merge them into one")
        with gr.Column(scale=3, min_width=320):
            gr.HTML(HOW_TO_FILES)
            with gr.Column(visible=False) as found:
                text = gr.Textbox(label="Contents", lines=6, max_lines=30, elem_id="holds", interactive=False)
            with gr.Column(visible=False) as measured:
                norms = gr.BarPlot(x="block", y="norm", color="file", title="How much each block is changed (norm)",
                                   height=300, x_label_angle=-45, sort=None, elem_id="norms", buttons=["fullscreen"],
                                   x_title="block of the model")  # fmt: skip
            with gr.Column(visible=False) as ready:
                made = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="made")

    actions = _Actions(page)
    inspected = inspect.click(actions.inspect, loras, [text, norms], api_name="inspect")
    inspected.success(lambda: [gr.Column(visible=True)] * 2, None, [found, measured], api_name=False)
    for button, action, inputs in (
        (convert, actions.convert, [loras, to, trigger]),
        (resize, actions.resize, [loras, rank, energy]),
        (merge, actions.merge, [loras, weights, most]),
    ):
        done = button.click(action, inputs, [made, text], api_name=action.__name__)
        done.success(lambda: [gr.Column(visible=True)] * 2, None, [found, ready], api_name=False)


class _Actions:
    """What the buttons do; each returns the files that it made, and says what that took."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        for name in ("inspect", "convert", "resize", "merge"):
            setattr(self, name, told(getattr(self, name)))

    def inspect(self, loras: list[str] | None):
        """What each file holds, and the norm of its update in each block."""
        import pandas

        from converters import describe

        found = [describe(path) for path in _chosen(loras)]
        rows = [(name, block.norm, Path(one.path).stem) for one in found for name, block in one.blocks.items()]
        text = "\n\n".join(as_text(one).replace(f"{Path(one.path).parent}/", "") for one in found)
        return text, pandas.DataFrame(rows, columns=["block", "norm", "file"])

    def convert(self, loras: list[str] | None, to: str, trigger: str):
        """Each in another format; PEFT's folders as archives."""
        from converters import prepare_conversion
        from converters.convert import is_folder_format

        return self._each(
            loras,
            "converted",
            lambda path, out: prepare_conversion(path, out, to, trigger=(trigger or "").strip()),
            "" if is_folder_format(to) else _SUFFIX,
        )

    def resize(self, loras: list[str] | None, rank: float, energy: float):
        """The nearest LoRA of lower ranks to each, and how much it misses."""
        from converters import read_lora
        from converters.arithmetic.algebra import resize
        from converters.arithmetic.ranks import RankRule

        rule = RankRule(None, None, "energy", energy) if energy else RankRule(int(rank))
        missed = []

        def make(path: Path, out: Path):
            smaller, errors = resize(read_lora(path), rule)
            missed.append(f"{path.name}: {what_is_missed(errors)}")
            return _prepared(smaller, [path], out)

        files, text = self._each(loras, "resized", make)
        return files, "\n".join([text, *missed])

    def merge(self, loras: list[str] | None, weights: str, most: float):
        """Their weighted sum."""
        from converters import read_lora
        from converters.arithmetic.algebra import merge
        from converters.arithmetic.ranks import RankRule

        paths = _chosen(loras)
        parts = list(zip(map(read_lora, paths), _weights(weights, len(paths)), strict=True))
        merged, errors = merge(parts, RankRule(int(most)) if most else None)
        out = self.page.folder.new_run("merged") / f"merged{_SUFFIX}"
        conversion = _prepared(merged, paths, out)
        files = [str(file) for file in conversion.write()]
        missed = [what_is_missed(errors)] if any(errors.values()) else []
        return files, "\n".join([f"merged {len(paths)} files", *conversion.notes, *missed])

    def _each(self, loras: list[str] | None, what: str, make: Any, suffix: str = _SUFFIX) -> tuple[list[str], str]:
        """Make something of each file, in a new folder."""
        paths, folder, files, said = _chosen(loras), self.page.folder.new_run(what), [], []
        for path in paths:
            out = folder / f"{path.stem}{suffix}"
            conversion = make(path, out)
            written = conversion.write()
            files += written if suffix else [shutil.make_archive(str(out), "zip", out)]
            said += [f"{what} {path.name}", *(f"  {note}" for note in conversion.notes)]
        return [str(file) for file in files], "\n".join(said)


def _prepared(lora: Any, sources: Sequence[Path], out: Path) -> Any:
    """A computed LoRA in the format of its first source, or in kohya's where that is a folder."""
    from converters.convert import detect_format, is_folder_format, prepare_writing

    found = detect_format(sources[0])
    return prepare_writing(lora, sources, out, "kohya" if is_folder_format(found) else found)


def _chosen(loras: list[str] | None) -> list[Path]:
    if not loras:
        raise ValueError("there is no file; drop a LoRA's .safetensors first")
    if len(loras) > MOST_FILES:
        raise ValueError(f"{len(loras)} files were dropped, but at most {MOST_FILES} are allowed at once; drop fewer")
    return [Path(path) for path in loras]


def _weights(text: str, number: int) -> list[float]:
    """What is typed as ``0.8, 0.5``.

    Raises:
        ValueError: it is none, or of another number of files.
    """
    parts = (text or "").replace(",", " ").split() or ["1"] * number
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"the weights are {text!r}; write numbers, such as 0.8, 0.5") from None
    if len(weights) != number:
        raise ValueError(f"there are {len(weights)} weights and {number} files; write a weight for each")
    return weights
