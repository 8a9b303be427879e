"""The second tab: a folder of people in, a LoRA of each out."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.web.bases import check_base, known_bases
from cli.web.fitting import LORAS, fit_people, outcomes
from cli.web.jobs import Job
from cli.web.personalize_tab import NO_CONSENT
from cli.web.sentences import told
from cli.web.status import HOW_TO_MANY, NO_SUCH_RUN, as_html, outcome_table
from cli.web.work_folder import companions, file_name

if TYPE_CHECKING:
    from cli.web.app import Page

MOST_PEOPLE = 500


def add_people_tab(page: "Page", consent: Any) -> None:
    """Build the tab and connect it; ``consent`` is the checkbox that a session ticks once."""
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            photos = gr.File(label="1. A photo of each person", file_count="multiple", file_types=["image"],
                             elem_id="people", height=180)  # fmt: skip
            gr.Markdown("A file's name becomes the name of its LoRA.", elem_classes="hdb-hint")
            folder = gr.Textbox("", label="Or a folder on this machine", max_lines=1, visible=page.is_local,
                                info="With a photo of each person, or a sub-folder of photos of each",
                                placeholder="/home/me/people")  # fmt: skip
            base = gr.Dropdown(known_bases(page.base), value=page.base, allow_custom_value=True, label="2. Base model",
                               info="The model that you draw with")  # fmt: skip
            with gr.Accordion("More settings", open=False):
                crop = gr.Checkbox(True, label="Find the faces",
                                   info="Unticked: use the centre square of each photo")  # fmt: skip
                steps = gr.Number(0, label="Steps", precision=0, minimum=0, maximum=10_000,
                                  info="0: as many as the base model has")  # fmt: skip
            with gr.Row():
                start = gr.Button("Start", variant="primary", min_width=120)
                stop = gr.Button("Stop", variant="stop", interactive=False, min_width=120)
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(HOW_TO_MANY, elem_id="people-status")
            table = gr.HTML(elem_id="people-table")
            with gr.Column(visible=False) as result:
                pictures = gr.Gallery(label="What their LoRAs draw", columns=5, height="auto", object_fit="contain",
                                      fit_columns=False, elem_id="people-pictures", buttons=[])  # fmt: skip
                files = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="people-files",
                                height=320)  # fmt: skip
    run = gr.Textbox(visible=False)
    seen = gr.State(-1)
    known = gr.BrowserState("", storage_key="hdb-people-run")
    timer = gr.Timer(1.0, active=False)

    actions = _Actions(page)
    start.click(
        actions.start_people, [photos, folder, base, crop, steps, consent, run], run, api_name="start_people"
    ).success(lambda key: (key, gr.Timer(active=True), -1), run, [known, timer, seen], api_name=False)
    stop.click(actions.stop_people, run, status, api_name="stop_people")
    shown = [status, stop, table, result, pictures, files, timer, seen]
    timer.tick(actions.show, [run, seen], shown, api_name=False, show_progress="hidden", concurrency_limit=None)
    page.blocks.load(lambda key: (key, gr.Timer(active=page.jobs.find(key) is not None)), known, [run, timer],
                     api_name=False)  # fmt: skip
    gr.api(actions.people, api_name="people")


class _Actions:
    """What the buttons do."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        for name in ("start_people", "stop_people", "people"):
            setattr(self, name, told(getattr(self, name)))

    def start_people(self, photos, folder, base, crop, steps, consent, run) -> str:
        """Put the fit of everybody into the queue; returns its key."""
        if not consent:
            raise ValueError(NO_CONSENT)
        self.page.jobs.check_free(run)
        base, folder = check_base(base, self.page.is_local), (folder or "").strip()
        if folder and photos:
            raise ValueError("both photos and a folder are given; choose one")
        if folder and not self.page.is_local:
            raise ValueError("a folder can be given only on localhost; upload photos instead")
        if folder and not Path(folder).expanduser().is_dir():
            raise ValueError(f"{folder} is not a folder on this machine; name one with a photo of each person")
        out = self.page.folder.new_run("people")
        people = Path(folder).expanduser() if folder else _gathered(photos, out / "photos")
        options = {"crop": crop} | ({"steps": int(steps)} if steps else {})
        job = Job("Many people", out)
        self.page.jobs.add(job, lambda job: fit_people(job, people, base, self.page.bases, options))
        return job.key

    def stop_people(self, run: str) -> str:
        """End after the step that is being done; whose LoRA is written keeps it."""
        job = self.page.jobs.find(run)
        if job is not None:
            job.stop.set()
            job.changed()
        return as_html(job, self.page.jobs)

    def people(self, run: str) -> dict:
        """What became of everybody."""
        job = self.page.jobs.find(run)
        if job is None:
            raise ValueError(NO_SUCH_RUN)
        return {"state": job.state, "error": job.error, "loras": _made(job), "people": outcomes(job)}

    def show(self, run: str, seen: int):
        """What has changed since the version ``seen``."""
        import gradio as gr

        job = self.page.jobs.find(run)
        if job is None or (job.version == seen and job.is_over):
            return [*([gr.skip()] * 6), gr.Timer(active=False), seen]
        if job.version == seen:
            return [gr.skip()] * 8
        version, loras = job.version, [Path(file) for file in _made(job)]
        pictures = [(str(file.with_suffix(".png")), file.stem) for file in loras if file.with_suffix(".png").exists()]
        files = [name for file in loras for name in companions(file)]
        busy = gr.Button(interactive=not job.is_over and not job.stop.is_set())
        return [as_html(job, self.page.jobs), busy, outcome_table(outcomes(job)), gr.Column(visible=bool(loras)),
                pictures, files, gr.Timer(active=True), version]  # fmt: skip


def _gathered(photos: list[str] | None, folder: Path) -> Path:
    """What was uploaded, as a folder of people."""
    if not photos:
        raise ValueError("there are no people; drop a photo of each person, or give a folder")
    if len(photos) > MOST_PEOPLE:
        raise ValueError(f"{len(photos)} photos were dropped, but at most {MOST_PEOPLE} are allowed; give a folder")
    folder.mkdir()
    for photo in map(Path, photos):
        target = folder / f"{file_name(photo.stem)}{photo.suffix}"
        number = 2
        while target.exists():
            target, number = folder / f"{file_name(photo.stem)}-{number}{photo.suffix}", number + 1
        shutil.copyfile(photo, target)
    return folder


def _made(job: Job) -> list[str]:
    """The LoRAs that are written so far, whether or not the run is over."""
    return sorted(str(file) for file in (job.folder / LORAS).glob("*.safetensors"))
