"""The paper's tables on anybody's people: methods fit each on one photo and are scored on other photos (section 5.2).

It also evaluates single LoRA files, whoever made them. Pictures and scores are kept, and an interrupted run resumes.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import Base, as_base, base_inputs, base_name
from hypernet.bundles import find_bundle
from hypernet.evaluation import baselines
from hypernet.evaluation.faces import FaceNetwork, load_faces
from hypernet.evaluation.harness import Method, Results, statistics
from hypernet.evaluation.judge import COLUMNS, Judge, Reference
from hypernet.evaluation.models import CLIP, DINO, load_clip, load_dino
from hypernet.evaluation.prompts import read_prompts
from hypernet.fitting.engine import Subject, fit_lora
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.crops import open_photos
from hypernet.inputs.people import People, PreparedPerson, Skipped, derive_seed, open_people, prepare_person
from hypernet.inputs.photos import to_pixels
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.prediction import Hypernet, load_network, weights_digest
from hypernet.opened_request import OpenedRequest, recipe_space
from hypernet.recipe import (
    DEFAULT_BASE,
    BaselineConfig,
    EvaluationConfig,
    FitConfig,
    PersonalizeConfig,
    StageProgress,
    changed,
)  # fmt: skip
from hypernet.request import PeopleRequest, request_people
from hypernet.sampling import generate, lora_applied, save_picture
from hypernet.sheets import contact_sheet
from lidb_peft import LiDBSpace, LoraFactors
from lidb_peft.files import atomic_folder, atomic_path, locked_folder
from lidb_peft.outputs import NO_FILE_NAME, check_output_folder
from lidb_peft.record import base_fingerprint
from lidb_peft.safe_read import read_header

METHODS = ("ours", "only-hypernetwork", "no-hypernetwork", "dreambooth", "lora-dreambooth", "textual-inversion")
REAL, STRANGERS = "the person's other photos", "other people's photos"
"""Rows that say what the numbers of photos are."""

RESULTS, SUMMARY, TABLE, SHEET, PICTURES = "results.jsonl", "results.json", "table.md", "sheet.png", "pictures"
_PREDICTED = ("ours", "only-hypernetwork")
_SHEET_PEOPLE, _SHEET_PROMPTS = 3, 5


class Fitted(NamedTuple):
    """What a method made of a person; drawn with the base as it is where there are no factors."""

    space: LiDBSpace | None = None
    factors: LoraFactors | None = None
    failed: str = ""


class Pictures(NamedTuple):
    """A person's pictures: by the plain prompt, and by each of the others; or why there are none."""

    plain: list[Image.Image]
    prompted: list[list[Image.Image]]
    failed: str = ""


@dataclass(frozen=True)
class JudgeModels:
    """By what pictures are judged: ids or folders, ``none`` to do without.

    Attributes:
        face: one of `FACE_NETWORKS`; ``auto`` is a bundled base's own, else facenet where it is installed, else dlib.
    """

    face: str = "auto"
    dino: str = DINO
    clip: str = CLIP

    def open(self, base: BaseModel, texts: Sequence[str]) -> Judge:
        """Load them on the base's device.

        Raises:
            FileNotFoundError, ValueError: one of them cannot be had; the message names it.
        """
        own = find_bundle(base.name).faces
        face: FaceNetwork | None = own() if own and self.face == "auto" else load_faces(self.face, base.device)
        dino = None if self.dino == "none" else load_dino(self.dino, base.device)
        clip = None if self.clip == "none" else load_clip(self.clip, base.device)
        return Judge(texts, face, dino, clip)


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        table: Markdown.
        rows: row -> column -> what `statistics` gives.
        out: the folder with everything.
        skipped: photos and people that were left out.
    """

    table: str
    rows: dict[str, dict[str, dict[str, float]]]
    out: Path
    skipped: Sequence[Skipped] = ()


class PeopleBench:
    """People to fit, how they are drawn, and who judges them: a `hypernet.evaluation.harness.Bench`.

    Attributes:
        shown: by name, the person on the shown photo alone.
        row: of the table, whose pictures are written.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        base: BaseModel,
        judge: Judge,
        config: EvaluationConfig,
        recipe: PersonalizeConfig,
        prompts: Sequence[str],
        out: Path,
        shown: dict[str, PreparedPerson],
        baselines: BaselineConfig,
        triggers: dict[str, str] | None = None,
    ) -> None:
        """Take all of it; ``triggers`` are rows' own prompts for the person, by row."""
        self.base, self.judge, self.config, self.recipe, self.prompts = base, judge, config, recipe, prompts
        self.out, self.shown, self.baselines, self.triggers = out, shown, baselines, triggers or {}
        self.row = ""
        self.progress: Callable[[int], None] = lambda done: None

    def subjects(self, people: Sequence[str]) -> list[Subject]:
        shown = [self.shown[name] for name in people]
        return make_subjects(self.base, shown, self.recipe.trigger, self.recipe.class_prompt)

    @cached_property
    def space(self) -> LiDBSpace:
        """Of the layers that a LoRA without a hypernetwork adapts."""
        return recipe_space(self.base, self.recipe, find_bundle(self.base.name).lidb_config)

    @cached_property
    def class_moments(self) -> Tensor:
        """VAE moments of the base's own pictures of the class, for prior preservation."""
        count = self.baselines.class_pictures
        seeds = [derive_seed("class picture", number) for number in range(count)]
        pictures = self._generate([self.recipe.class_prompt] * count, seeds)
        return self.base.encode_photos(torch.stack([to_pixels(picture) for picture in pictures]))

    def draw(self, fitted: Sequence[Fitted], people: Sequence[str], seed: int, first: int) -> list[Pictures]:
        """Draw each person and keep the pictures; every picture has noise of its own, the same for all methods."""
        return [self._draw(one, name, seed) for one, name in zip(fitted, people, strict=True)]

    def score(self, pictures: Sequence[Pictures], people: Sequence[str]) -> list[dict]:
        return [
            {"person": name} | (
                {"failed": each.failed} if each.failed else self.judge.score(name, each.plain, each.prompted)
            )
            for name, each in zip(people, pictures, strict=True)
        ]  # fmt: skip

    def folder(self, row: str, name: str, seed: int) -> Path:
        """Where a person's pictures are kept."""
        number = list(self.shown).index(name)
        parts = [NO_FILE_NAME.sub("-", part).strip(". ")[:60] for part in (row, f"{number:04}-{name}")]
        return self.out / PICTURES / parts[0] / parts[1] / f"seed-{seed}"

    def _draw(self, fitted: Fitted, name: str, seed: int) -> Pictures:
        if fitted.failed:
            return Pictures([], [], fitted.failed)
        trigger, count = self.triggers.get(self.row, self.recipe.trigger), self.config.pictures
        texts = [prompt.format(trigger) for prompt in ("{}", *self.prompts) for _ in range(count)]
        seeds = [derive_seed(seed, name, number) for number in range(len(texts))]
        drawn = self._generate(texts, seeds, fitted.space, fitted.factors)
        folder = self.folder(self.row, name, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder, overwrite=True) as temporary:
            for number, picture in enumerate(drawn):
                picture.save(temporary / f"{number // count:02}-{number % count}.png")
        groups = [drawn[start : start + count] for start in range(0, len(drawn), count)]
        return Pictures(groups[0], groups[1:])

    def _generate(self, texts: Sequence[str], seeds: Sequence[int], *weights: Any) -> list[Image.Image]:
        options: dict[str, Any] = {
            "seed": seeds, "num_steps": self.config.num_steps, "guidance": self.recipe.guidance,
        }  # fmt: skip
        return generate(self.base, texts, *weights, **options)


@contextmanager
def personalized(
    bench: PeopleBench, people: Sequence[str], seed: int, request: PeopleRequest
) -> Iterator[list[Fitted]]:
    """As `hypernet.personalize` fits: with the hypernetwork of the request, or without."""
    request = replace(request, config=replace(request.config, seed=request.config.seed + 1000 * seed))
    opened = OpenedRequest(request, bench.base)
    shown = [bench.shown[name] for name in people]
    found = opened.fit(shown, opened.starts(shown))
    yield [
        Fitted(failed=str(each)) if isinstance(each, ValueError) else Fitted(opened.space, each.factors)
        for each in found
    ]


@contextmanager
def lora_dreambooth(bench: PeopleBench, people: Sequence[str], seed: int) -> Iterator[list[Fitted]]:
    """A LoRA with the plain denoising loss, one timestep a step."""
    settings = bench.baselines
    fit = FitConfig(settings.lora_steps, settings.lora_lr, seed=seed)
    failed: dict[int, str] = {}
    factors, _ = fit_lora(bench.base, bench.space, bench.subjects(people), fit, settings.lora_rank, failed=failed)
    yield [Fitted(bench.space, each, failed.get(row, "")) for row, each in enumerate(factors)]


@contextmanager
def dreambooth(bench: PeopleBench, people: Sequence[str], seed: int) -> Iterator[list[Fitted]]:
    (subject,), settings = bench.subjects(people), bench.baselines
    steps, lr = settings.dreambooth_steps, settings.dreambooth_lr
    with baselines.dreambooth(bench.base, subject, bench.class_moments, steps, lr, seed):
        yield [Fitted()]


@contextmanager
def textual_inversion(bench: PeopleBench, people: Sequence[str], seed: int) -> Iterator[list[Fitted]]:
    settings = bench.baselines
    steps, lr, start = settings.inversion_steps, settings.inversion_lr, settings.inversion_start
    with baselines.textual_inversion(bench.base, bench.subjects(people), bench.recipe.token, start, steps, lr, seed):
        yield [Fitted()] * len(people)


@contextmanager
def from_file(bench: PeopleBench, people: Sequence[str], seed: int, lora: Path) -> Iterator[list[Fitted]]:
    """A LoRA that somebody made."""
    with lora_applied(bench.base, lora):
        yield [Fitted()] * len(people)


def evaluate(
    people: People | str | Path,
    base: Base = DEFAULT_BASE,
    out: str | Path = "evaluation",
    methods: Sequence[str] = METHODS,
    hypernet: Hypernet | None = "auto",
    models: JudgeModels | None = None,
    config: EvaluationConfig | None = None,
    prompts: str | Path | None = None,
    baseline_options: dict[str, Any] | None = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> Evaluation:
    """Compare methods on people: each is fitted on the first of their photos and scored on the others.

    Writes ``results.jsonl`` (a line for each method, person and seed; existing ones are not computed again),
    ``results.json``, ``table.md``, ``sheet.png`` and the pictures.

    Args:
        people: anything that `open_people` opens, at best a folder with a sub-folder of photos for each person, because
            a person with only one photo is scored on the photo that the methods were given.
        methods: names in `METHODS`.
        hypernet: as for `personalize`; ``ours`` and ``only-hypernetwork`` require one.
        models: the networks that compute the scores.
        prompts: a file as `read_prompts` reads it; by default 30 prompts for faces.
        baseline_options: fields of `BaselineConfig` to change.
        options: fields of our recipe to change, such as ``crop=False``.

    Raises:
        BlockingIOError: another run is at work in ``out``.
        ValueError, OSError: a method, a model or the people are unusable, or ``out`` holds another run's results.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"there is no method {unknown[0] if unknown else ''!r}; choose from {', '.join(METHODS)}")
    config, models, out, texts = config or EvaluationConfig(), models or JudgeModels(), Path(out), read_prompts(prompts)
    name = base_name(base)
    fitted_by = changed(find_bundle(name).baselines, baseline_options or {})
    opened = people if isinstance(people, People) else open_people(people)
    requests = _requests(opened, out, base, methods, hypernet, options)
    recipe = next(iter(requests.values())).config
    base = as_base(base)
    judge = models.open(base, [text.format(recipe.class_prompt) for text in texts])
    shown, references, skipped = _meet(opened, base.size_px, recipe, config.people)
    bench = PeopleBench(base, judge, config, recipe, texts, out, shown, fitted_by)
    rows: dict[str, Method] = {
        "dreambooth": dreambooth, "lora-dreambooth": lora_dreambooth, "textual-inversion": textual_inversion,
        **{method: partial(personalized, request=request) for method, request in requests.items()},
    }  # fmt: skip
    photos = derive_seed(*(person.key for person in shown.values()))
    settings = {
        "people": {"source": opened.source, "names": list(shown), "photos": photos},
        "baselines": asdict(fitted_by),
        "recipe": {name: value for name, value in asdict(recipe).items() if name not in ("steps", "theta_steps")},
        "rows": {name: _fit_settings(request) for name, request in requests.items() if name in methods},
    }  # fmt: skip
    return _compare(bench, {method: rows[method] for method in methods}, references, settings, skipped, progress)


def evaluate_loras(
    loras: Sequence[str | Path],
    references: Sequence[str | Path],
    base: Base = DEFAULT_BASE,
    out: str | Path = "evaluation",
    trigger: str | None = None,
    models: JudgeModels | None = None,
    config: EvaluationConfig | None = None,
    prompts: str | Path | None = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> Evaluation:
    """Judge LoRA files, whoever made them, of the person in the photos ``references``; writes as `evaluate`.

    Args:
        trigger: what calls the person up; by default what a file says, or else the recipe's own prompt.
        options: as for `evaluate`.

    Raises:
        ValueError, OSError: as `evaluate`, or a LoRA is of another base.
    """
    if not loras or not references:
        raise ValueError("LoRAs are judged by photos of the person; pass at least one of each")
    config, models, out, texts = config or EvaluationConfig(), models or JudgeModels(), Path(out), read_prompts(prompts)
    recipe = changed(find_bundle(base_name(base)).recipe, options)
    files = {Path(lora).stem: Path(lora) for lora in loras}
    if len(files) < len(loras):
        raise ValueError("two of the LoRA files have one name; rename one of them")
    triggers = {row: trigger or _own_trigger(file) or recipe.trigger for row, file in files.items()}
    check_output_folder(out, [*loras, *references, *base_inputs(base)], is_resumed=True, may_hold_inputs=True)
    base = as_base(base)
    for file in files.values():
        with lora_applied(base, file):
            pass
    judge = models.open(base, [text.format(recipe.class_prompt) for text in texts])
    opened, left_out = open_photos(references, recipe.crop, recipe.face_detector, recipe.face)
    photos = tuple(photo.prepare(base.size_px) for photo in opened)
    person = PreparedPerson("person", photos)
    reference = Reference("person", [photos[0].image], [photo.image for photo in photos])
    bench = PeopleBench(base, judge, config, recipe, texts, out, {"person": person}, BaselineConfig(), triggers)
    rows: dict[str, Method] = {row: partial(from_file, lora=file) for row, file in files.items()}
    settings = {
        "references": person.key, "trigger": trigger or "",
        "rows": {row: {"file": _file_digest(file)} for row, file in files.items()},
    }  # fmt: skip
    skipped = [Skipped("a reference photo", reason) for reason in left_out]
    return _compare(bench, rows, [reference], settings, skipped, progress)


def _compare(
    bench: PeopleBench,
    rows: dict[str, Method],
    references: Sequence[Reference],
    settings: dict[str, Any],
    skipped: Sequence[Skipped],
    progress: StageProgress | None,
) -> Evaluation:
    """Complete every row, and write what follows from the scores."""
    config, out, names = bench.config, bench.out, list(bench.shown)
    settings = settings | {
        "base": Path(bench.base.name).name,
        "base_fingerprint": base_fingerprint(bench.base.adapted),
        "models": bench.judge.models,
        "prompts": list(bench.prompts),
        "pictures": config.pictures,
        "num_steps": config.num_steps,
    }
    with locked_folder(out, "hdb eval"):
        results = Results(out / RESULTS, (*COLUMNS, "seconds"), settings)
        bench.judge.meet(references)
        report = progress or (lambda stage, done, total: None)

        def scored(row: str, seed: int, line: str) -> None:
            report(row, seed * len(names) + len(results.lines[row, seed]), config.seeds * len(names))

        for row, method in rows.items():
            bench.row = row
            batch = config.batch_size if isinstance(method, partial) and "request" in method.keywords else 1
            for seed in range(config.seeds):
                report(row, seed * len(names), config.seeds * len(names))
                results.complete(
                    bench, row, method, names, seed, batch,
                    partial(scored, row, seed),
                )  # fmt: skip
        photos = _photo_rows(bench.judge, references)
        for row, lines in photos.items():
            results.lines[row, 0] = lines
        measured = [name for name in results.columns if any(name in line for x in results.lines.values() for line in x)]
        shown_rows = [*rows, *photos]
        table = results.table(shown_rows, measured)
        summary = {row: {name: statistics(results.seeds_of(row), name) for name in measured} for row in shown_rows}
        _write(out, settings, table, summary, measured, skipped)
        sheet = _sheet(bench, list(rows), references)
        if sheet is not None:
            save_picture(sheet, out / SHEET)
    return Evaluation(table, summary, out, skipped)


def _requests(
    people: People, out: Path, base: Base, methods: Sequence[str], hypernet: Hypernet | None, options: dict[str, Any]
) -> dict[str, PeopleRequest]:
    """What our own methods ask for; the first one's recipe has the prompt that all are fitted and drawn with."""

    def request(hypernet: Hypernet | None) -> PeopleRequest:
        return request_people(people, out, hypernet=hypernet, base=base, options=options)

    needing = [method for method in methods if method in _PREDICTED]
    found = {}
    if needing:
        ours = request(hypernet)
        if ours.network is None:
            raise ValueError(f"{' and '.join(needing)}: there is no hypernetwork for {base_name(base)} to start from; "
                             "pass --hypernet, or leave out of --methods what needs one")  # fmt: skip
        alone = replace(ours, start=None, config=replace(ours.config, steps=0, theta_steps=0))
        found = {name: each for name, each in zip(_PREDICTED, (ours, alone), strict=True) if name in methods}
    if "no-hypernetwork" in methods or not found:
        found["no-hypernetwork"] = request(None)
    triggers = {each.config.trigger for each in found.values()}
    if len(triggers) > 1:
        raise ValueError(f"the methods would be drawn with different prompts, {' and '.join(sorted(triggers))}; give "
                         "the hypernetwork's --token and --prompt")  # fmt: skip
    return found


def _fit_settings(request: PeopleRequest) -> dict[str, Any]:
    """What the scores of one of our own methods depend on, and those of the others do not."""
    network = load_network(request.network) if isinstance(request.network, HyperNetworkConfig) else request.network
    digest = "" if network is None else weights_digest(network)
    return {"steps": request.config.steps, "theta_steps": request.config.theta_steps, "hypernetwork": digest}


def _file_digest(path: Path) -> str:
    """16 hex digits that change with the tensors of a LoRA, which may be a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _meet(
    people: People, size_px: int, recipe: PersonalizeConfig, most: int | None
) -> tuple[dict[str, PreparedPerson], list[Reference], list[Skipped]]:
    """Each person on the first usable photo, and the photos to compare with.

    Raises:
        ValueError: fewer than two people can be used, or two have one name.
    """
    shown: dict[str, PreparedPerson] = {}
    references, skipped = [], []
    for person in people:
        prepared, left_out = prepare_person(person, size_px, recipe.crop, recipe.face_detector, face=recipe.face)
        skipped += left_out
        if prepared is None:
            continue
        if prepared.name in shown:
            raise ValueError(f"two of the people are called {prepared.name}; rename one of them")
        first, others = prepared.photos[:1], prepared.photos[1:]
        shown[prepared.name] = PreparedPerson(prepared.name, first)
        compared = [photo.image for photo in others or first]
        references.append(Reference(prepared.name, [photo.image for photo in first], compared))
        if len(shown) == most:
            break
    if len(shown) < 2:
        reason = f"; {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{people.source} has {len(shown)} people that can be used, and a table needs 2 or more, each "
                         f"a photo or a sub-folder of photos{reason}")  # fmt: skip
    return shown, references, skipped


def _photo_rows(judge: Judge, references: Sequence[Reference]) -> dict[str, list[dict]]:
    """What photos score in the place of pictures: the best and the worst that a method can expect."""
    real = [
        {"person": each.name, **judge.real(each.name, each.references[0] is not each.shown[0])} for each in references
    ]
    rows = {REAL: [line for line in real if len(line) > 1]}
    if len(references) > 1:
        others = [*references[1:], references[0]]
        rows[STRANGERS] = [{"person": each.name, **judge.stranger(each.name, other.name)}
                           for each, other in zip(references, others, strict=True)]  # fmt: skip
    return {row: lines for row, lines in rows.items() if lines}


def _write(
    out: Path, settings: dict[str, Any], table: str, rows: dict, measured: Sequence[str], skipped: Sequence[Skipped]
) -> None:
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    content = {
        "settings": settings, "columns": {name: COLUMNS.get(name, "of fitting a person") for name in measured},
        "rows": rows, "skipped": [each._asdict() for each in skipped], "versions": versions,
    }  # fmt: skip
    with atomic_path(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with atomic_path(out / TABLE) as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")


def _sheet(bench: PeopleBench, rows: Sequence[str], references: Sequence[Reference]) -> Image.Image | None:
    """The first people by every method: the shown photo, the plain picture, and some prompts; None if all failed."""
    step = max(1, len(bench.prompts) // _SHEET_PROMPTS)
    chosen = [0, *range(1, len(bench.prompts) + 1, step)][: _SHEET_PROMPTS + 1]
    lines = []
    for person in references[:_SHEET_PEOPLE]:
        for row in rows:
            files = [bench.folder(row, person.name, 0) / f"{number:02}-0.png" for number in chosen]
            if all(file.is_file() for file in files):
                lines.append((f"{row}\n{person.name[:18]}", [person.shown[0], *(_opened(file) for file in files)]))
    texts = ["{}", *bench.prompts]
    if not lines:
        return None
    return contact_sheet(lines, ["photo", *(texts[number].format(bench.recipe.trigger) for number in chosen)])


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _own_trigger(file: Path) -> str:
    return read_header(file).metadata.get("modelspec.trigger_phrase", "") if file.is_file() else ""
