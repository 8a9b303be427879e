"""The first tab: photos in, a LoRA out, and which of its steps and weights to take."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from PIL import Image

from cli.web import presets
from cli.web.bases import check_base, known_bases
from cli.web.crops import show_crops
from cli.web.fitting import Wishes, fit_person
from cli.web.jobs import Job
from cli.web.sentences import told
from cli.web.status import HOW_TO, as_html, as_json, loss_table
from cli.web.work_folder import companions, copy_lora, file_name, find_lora_folder, lines

if TYPE_CHECKING:
    from cli.web.app import Page

MOST_PHOTOS = 20
NO_CONSENT = "tick the box at the top: make a LoRA only of yourself, or of somebody who has agreed to it"


def add_personalize_tab(page: "Page", consent: Any) -> None:
    """Build the tab and connect it.

    Args:
        consent: the checkbox that a session ticks once.
    """
    import gradio as gr

    with gr.Row(equal_height=False):
        form, out = _form(page), _outcome(page)
    run = gr.Textbox(visible=False)  # the key of this page's job
    seen = gr.State(-1)  # the version of the job that is shown
    known = gr.BrowserState("", storage_key="hdb-run")
    timer = gr.Timer(0.7, active=False)
    shown = [out.status, out.way, out.samples, out.loss, form.stop, out.result, out.step, out.weight, out.sheet, timer,
             seen]  # fmt: skip

    actions = _Actions(page)
    gr.on(  # one after the other: the squares of what was chosen last are those that stay
        [form.photos.change, form.crop.change, form.face.change], actions.crops, [form.photos, form.crop, form.face],
        [form.crops, form.left_out],
        api_name="crops", trigger_mode="always_last",
    )  # fmt: skip
    wishes = [form.photos, form.base, form.preset, form.name, form.prompts, form.crop, form.face, form.steps, form.rank,
              form.seed, form.sampling, consent, run]  # fmt: skip
    started = form.start.click(actions.start, wishes, run, api_name="start")
    started.success(lambda key: (key, gr.Timer(active=True), -1), run, [known, timer, seen], api_name=False)
    form.stop.click(actions.stop, run, out.status, api_name="stop")
    timer.tick(actions.show, [run, seen], shown, api_name=False, show_progress="hidden", concurrency_limit=None)
    page.blocks.load(actions.resume, known, [run, timer], api_name=False)
    for event, api_name in ((out.step.change, "choose"), (out.weight.change, False), (out.sheet.change, False)):
        event(actions.choose, [run, out.step, out.weight], [out.picture, out.use, out.files], show_progress="hidden",
              api_name=api_name)  # fmt: skip
    out.install.click(actions.install, [run, out.step, form.name, out.program], None, api_name="install")
    gr.api(actions.status, api_name="status")
    gr.api(actions.sheet, api_name="sheet")


def _form(page: "Page") -> SimpleNamespace:
    """The left column: what somebody wishes; its fields by name."""
    import gradio as gr

    with gr.Column(scale=2, min_width=320):
        photos = gr.File(label="1. Photos of one person", file_count="multiple", file_types=["image"],
                         elem_id="photos", height=180)  # fmt: skip
        crops = gr.Gallery(label="How they are cropped: do all show the same person?", columns=4, elem_id="crops",
                           fit_columns=False, height="auto", visible=False, buttons=[])  # fmt: skip
        left_out = gr.Markdown(visible=False, elem_classes="hdb-warning")
        base = gr.Dropdown(known_bases(page.base), value=page.base, allow_custom_value=True, elem_id="base",
                           label="2. Base model", info="The model that you draw with: one of the list, a Hugging "
                                                       "Face id, a folder or a file")  # fmt: skip
        preset = gr.Dropdown(presets.CHOICES, value=presets.NONE, label="3. Preset", elem_id="preset",
                             info="More steps take longer and leave more to choose from")  # fmt: skip
        name = gr.Textbox("me", label="4. Name of the LoRA", elem_id="name", max_lines=1)
        prompts = gr.Textbox(label="5. Prompts to try it with", lines=2, elem_id="prompts",
                             info='One a line; "a sks face" stands for the person',
                             placeholder="a sks face")  # fmt: skip
        with gr.Accordion("More settings", open=False):
            crop = gr.Checkbox(True, label="Find the face", elem_id="crop",
                               info="Unticked: use the centre square of each photo")  # fmt: skip
            face = gr.Dropdown(["largest", "leftmost", "rightmost"], value="largest", label="Of several faces")
            steps = gr.Number(0, label="Steps", precision=0, minimum=0, maximum=10_000,
                              info="0: as many as the preset or the base model has")  # fmt: skip
            rank = gr.Number(0, label="Rank", precision=0, minimum=0, maximum=256,
                             info="A higher rank is a larger file that can hold more; 0: the usual")  # fmt: skip
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="Another number, another result")
            sampling = gr.Number(30, label="Sampling steps of the pictures", precision=0, minimum=1, maximum=150,
                                 info="Fewer are faster and coarser")  # fmt: skip
        with gr.Row():
            start = gr.Button("Start", variant="primary", elem_id="start", min_width=120)
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=120)
    return SimpleNamespace(
        photos=photos, crops=crops, left_out=left_out, base=base, preset=preset, name=name, prompts=prompts,
        crop=crop, face=face, steps=steps, rank=rank, seed=seed, sampling=sampling, start=start, stop=stop,
    )  # fmt: skip


def _outcome(page: "Page") -> SimpleNamespace:
    """The right column: what comes of it; its fields by name."""
    import gradio as gr

    with gr.Column(scale=3, min_width=320):
        status = gr.HTML(HOW_TO, elem_id="status")
        with gr.Row(equal_height=True, visible=False) as way:
            samples = gr.Gallery(label="Samples while it learns", columns=4, fit_columns=False, height=240,
                                 buttons=[], elem_id="samples", scale=3, min_width=240)  # fmt: skip
            loss = gr.LinePlot(x="step", y="loss", height=240, title="Loss: should fall", scale=2,
                               min_width=240, buttons=[])  # fmt: skip
        with gr.Column(visible=False, elem_id="result") as result:
            picture = gr.Gallery(label="Choose a step and a weight", columns=3, fit_columns=False, height="auto",
                                 elem_id="picture", buttons=["fullscreen"])  # fmt: skip
            with gr.Row():
                step = gr.Slider(0, 10_000, step=1, label="Step", elem_id="step", min_width=240,
                                 info="Later ones look more like the photos, and obey prompts less")  # fmt: skip
                weight = gr.Slider(0, 2, value=1.0, step=0.2, label="Weight", elem_id="weight", min_width=240,
                                   info="How strongly the LoRA is applied")  # fmt: skip
            use = gr.Markdown(elem_id="use")
            files = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="files")
            with gr.Row(equal_height=False, visible=page.is_local):
                program = gr.Textbox(label="Or save it into A1111, Forge or ComfyUI", scale=3, max_lines=1,
                                     placeholder="their folder, such as ~/ComfyUI", min_width=200)  # fmt: skip
                install = gr.Button("Save there", size="md", scale=1, min_width=100)
            with gr.Accordion("All steps and weights in one picture", open=False):
                sheet = gr.Image(type="filepath", show_label=False, elem_id="sheet")
    return SimpleNamespace(
        status=status, way=way, samples=samples, loss=loss, result=result, picture=picture, step=step, weight=weight,
        use=use, files=files, program=program, install=install, sheet=sheet,
    )  # fmt: skip


class _Actions:
    """What the buttons do; each is told of as a sentence if it cannot be done."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        for name in ("crops", "start", "stop", "choose", "install", "status", "sheet"):
            setattr(self, name, told(getattr(self, name)))

    def crops(self, photos: list[str] | None, crop: bool, face: str):
        """Squares that would be taken, and the photos that cannot be used."""
        import gradio as gr

        if not photos:
            return gr.Gallery([], visible=False), gr.Markdown("", visible=False)
        shown, problems = show_crops(_checked(photos), crop, face)
        text = "\n".join(f"- {problem}" for problem in problems)
        return gr.Gallery(shown, visible=bool(shown)), gr.Markdown(text, visible=bool(problems))

    def start(self, photos, base, preset, name, prompts, crop, face, steps, rank, seed, sampling, consent, run) -> str:
        """Put a fit into the queue; returns its key, by which alone it can be looked at."""
        if not consent:
            raise ValueError(NO_CONSENT)
        self.page.jobs.check_free(run)
        base = check_base(base, self.page.is_local)
        chosen = {"steps": int(steps or 0), "rank": int(rank or 0)}
        options = {"crop": crop, "face": face, "seed": int(seed or 0)} | {key: n for key, n in chosen.items() if n}
        wishes = Wishes(
            tuple(_checked(photos)), base, file_name(name), tuple(lines(prompts)),
            sampling_steps=int(sampling or 30), preset=presets.read_preset(preset), options=options,
        )  # fmt: skip
        job = Job(wishes.name, self.page.folder.new_run(wishes.name))
        self.page.jobs.add(job, lambda job: fit_person(job, wishes, self.page.bases))
        return job.key

    def stop(self, run: str) -> str:
        """Ask this page's fit to end with what there is."""
        job = self.page.jobs.find(run)
        if job is not None:
            job.stop.set()
            job.changed()
        return as_html(job, self.page.jobs)

    def resume(self, known: str):
        """A page that was closed or loaded anew finds its fit again."""
        import gradio as gr

        return known, gr.Timer(active=self.page.jobs.find(known) is not None)

    def show(self, run: str, seen: int):
        """What has changed since the version ``seen``."""
        import gradio as gr

        job = self.page.jobs.find(run)
        if job is None or (job.version == seen and job.is_over):
            return [*([gr.skip()] * 9), gr.Timer(active=False), seen]
        if job.version == seen:
            return [gr.skip()] * 11
        version, loras = job.version, job.results.get("loras")
        choice: list[Any] = [gr.skip()] * 4
        if loras and job.is_over:
            weights = sorted({weight for _, weight in job.results.get("pictures", {})}) or [1.0]
            choice = [
                gr.Column(visible=True),
                # With another minimum Gradio refuses the values that it sends at the same time.
                gr.Slider(maximum=max(loras) or 1, value=max(loras)),
                gr.Slider(maximum=weights[-1], value=weights[-1]),
                gr.Image(job.results.get("sheet")),
            ]
        elif not job.is_over:
            choice[0] = gr.Column(visible=False)
        status = as_html(job, self.page.jobs)
        busy = gr.Button(interactive=not job.is_over and not job.stop.is_set())
        way = gr.Row(visible=bool(job.samples or job.losses))
        return [status, way, list(job.samples), loss_table(job), busy, *choice, gr.Timer(active=True), version]

    def choose(self, run: str, step: float, weight: float):
        """The pictures and files of the LoRA that was kept nearest to ``step``, drawn with the weight nearest."""
        job, step = self._made(run), 0 if step is None else step
        kept = _nearest(job.results["loras"], step)
        pictures = job.results.get("pictures", {})
        drawn = _nearest({weight for at, weight in pictures if at == kept}, weight) if pictures else 1.0
        captions = job.results.get("prompts", ())
        shown = [(_enlarged(one), prompt)
                 for one, prompt in zip(pictures.get((kept, drawn), ()), captions, strict=False)]  # fmt: skip
        file = Path(job.results["loras"][kept])
        prompt = f"{job.results['trigger']} <lora:{file.stem}:{drawn:g}>"
        use = f"Step **{kept}**, weight **{drawn:g}**. In a prompt: `{prompt}`"
        return shown, use, companions(file)

    def install(self, run: str, step: float, name: str, program: str) -> None:
        """Copy the chosen LoRA, its sidecar and its picture to where a program looks for them."""
        import gradio as gr

        if not self.page.is_local:
            raise ValueError("saving into other folders is possible only on localhost; download the files")
        if not (program or "").strip():
            raise ValueError("enter the folder of A1111, Forge or ComfyUI, such as ~/ComfyUI")
        loras = self._made(run).results["loras"]
        copied = copy_lora(Path(loras[_nearest(loras, step)]), find_lora_folder(program), file_name(name))
        gr.Info(f"saved {copied[0]}; refresh the list of LoRAs there")

    def status(self, run: str) -> dict:
        """How far a fit is."""
        return as_json(self.page.jobs.find(run), self.page.jobs)

    def sheet(self, run: str) -> str:
        """The file of a fit's sheet of steps x weights, "" if there is none yet."""
        return str(self._made(run).results.get("sheet", ""))

    def _made(self, run: str) -> Job:
        job = self.page.jobs.find(run)
        if job is None or not job.results.get("loras"):
            raise ValueError("there is no LoRA yet; press Start and wait until it is done")
        return job


def _checked(photos: list[str] | None) -> list[str]:
    if not photos:
        raise ValueError("there is no photo; drop at least one")
    if len(photos) > MOST_PHOTOS:
        raise ValueError(f"{len(photos)} photos were dropped, but at most {MOST_PHOTOS} are allowed; choose the best")
    return list(photos)


def _nearest(values, wanted: float):
    return min(values, key=lambda value: abs(value - wanted))


def _enlarged(picture: Image.Image, side_px: int = 256) -> Image.Image:
    """A small picture large enough to be looked at, its pixels as they are."""
    if picture.width >= side_px:
        return picture
    return picture.resize((side_px, side_px * picture.height // picture.width), Image.Resampling.NEAREST)
