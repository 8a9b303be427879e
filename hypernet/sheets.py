"""Sheets of pictures: any LoRAs x weights x prompts x seeds, as Automatic1111's X/Y/Z plot shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from converters import describe
from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import Base, as_base, base_inputs
from hypernet.infotext import Infotext
from hypernet.prompts import warn_of_prompts
from hypernet.recipe import Progress
from hypernet.samplers import check_sampler, make_sampler, sampler_name
from hypernet.sampling import check_lora, generate, own_guidance, own_size, save_picture
from lidb_peft import LiDBSpace, LoraFactors
from lidb_peft.outputs import FOLDER, check_output

BASE = "base"
"""What a sheet calls the base without a LoRA."""
_CELL_PX, _MARGIN_PX, _LEFT_PX, _LINE_PX, _TEXT_PX = 192, 8, 150, 18, 15

SheetLora = str | Path | LoraFactors | None
"""A LoRA to draw with: a file of any author, or factors; None is the base alone."""


@dataclass(frozen=True)
class DrawConfig:
    """Settings for drawing.

    Attributes:
        num_steps: sampling steps.
        guidance: guidance scale, A1111's CFG scale; None is the base's own.
        negative: negative prompt.
        size: width and height in pixels; None is the base's own.
        sampler: sampler by its Automatic1111 name, see `hypernet.samplers.SAMPLERS`; None is the base's own.
        clip_skip: CLIP layer to use, counted from the last, which is 1, as in Automatic1111.
    """

    num_steps: int = 30
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None
    sampler: str | None = None
    clip_skip: int = 1

    def __post_init__(self) -> None:
        for name in ("num_steps", "clip_skip"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.sampler is not None:
            check_sampler(self.sampler)


@dataclass(frozen=True)
class SheetPicture:
    """One picture of a sheet with its generation parameters."""

    image: Image.Image
    lora: str
    weight: float
    prompt: str
    seed: int
    infotext: Infotext


@dataclass(frozen=True)
class Sheet:
    """Pictures of all LoRAs, weights, prompts and seeds.

    Attributes:
        loras: names of the LoRAs.
        pictures: by LoRA, weight, prompt and seed, the last changing first.
    """

    loras: tuple[str, ...]
    weights: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pictures: tuple[SheetPicture, ...]

    def picture(self, lora: int, weight: int, prompt: int, seed: int) -> SheetPicture:
        """The picture of the LoRA, weight, prompt and seed with these numbers, from 0."""
        row = (lora * len(self.weights) + weight) * len(self.prompts) + prompt
        return self.pictures[row * len(self.seeds) + seed]

    @cached_property
    def image(self) -> Image.Image:
        """All of them, labelled: LoRAs down, weights across, and a grid for each prompt and seed.

        With one weight there is one grid, prompts and seeds across; a single picture is as it is.
        """
        if len(self.pictures) == 1:
            return self.pictures[0].image
        places = [(prompt, seed) for prompt in range(len(self.prompts)) for seed in range(len(self.seeds))]
        if len(self.weights) == 1:
            rows = [(lora, [self.picture(row, 0, *place).image for place in places])
                    for row, lora in enumerate(self.loras)]  # fmt: skip
            return contact_sheet(rows, [self._label(*place) for place in places])
        columns = range(len(self.weights))
        heads = [f"weight {weight:g}" for weight in self.weights]
        grids = []
        for place in places:
            rows = [(lora, [self.picture(row, column, *place).image for column in columns])
                    for row, lora in enumerate(self.loras)]  # fmt: skip
            grids.append(contact_sheet(rows, heads, title=self._label(*place)))
        return _stack(grids)

    @property
    def infotext(self) -> Infotext:
        """What the first picture was drawn with, and what changes from it to the others, as an X/Y/Z plot has it."""
        first = self.pictures[0].infotext
        axes = {"Weight": [f"{weight:g}" for weight in self.weights], "LoRA": self.loras, "Prompt": self.prompts,
                "Seed": list(map(str, self.seeds))}  # fmt: skip
        changing = {name: values for name, values in axes.items() if len(values) > 1}
        told = {"Script": "X/Y/Z plot"} if changing else {}
        for axis, (name, values) in zip("XYZW", changing.items(), strict=False):
            told |= {f"{axis} Type": name, f"{axis} Values": ", ".join(values)}
        return Infotext(first.prompt, first.negative, {**first.fields, **told})

    def _label(self, prompt: int, seed: int) -> str:
        text = self.prompts[prompt]
        return text if len(self.seeds) == 1 else f"{text} (seed {self.seeds[seed]})"

    def save(self, out: str | Path, folder: str | Path | None = None) -> list[Path]:
        """Write the sheet as a PNG, and each picture too if there is a folder for them; returns the files."""
        files = [Path(out)]
        save_picture(self.image, out, str(self.infotext))
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(self.pictures):
                files.append(Path(folder) / picture_name(number, picture.seed))
                save_picture(picture.image, files[-1], str(picture.infotext))
        return files


def picture_name(number: int, seed: int) -> str:
    """What Automatic1111 calls a picture's file."""
    return f"{number:05d}-{seed}.png"


def draw_sheet(
    base: Base,
    prompts: str | Sequence[str],
    loras: Mapping[str, SheetLora] | Sequence[str | Path] = (),
    weights: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0,),
    config: DrawConfig | None = None,
    space: LiDBSpace | None = None,
    progress: Progress | None = None,
) -> Sheet:
    """Draw every LoRA at every weight with every prompt from every seed.

    ``draw_sheet("testbed", "a sks face", ["me.safetensors"], weights=[0.6, 0.8, 1.0]).save("sheet.png")``

    Args:
        base: a loaded base model, or what `load_base` loads.
        loras: files, or name -> a file, factors (such as a result's ``snapshots``), or None for the base alone; an
            empty sequence also draws the base alone.
        space: of the factors' layers; by default as `generate` finds it.
        config: settings; by default the base's own.
        progress: called with (steps done, total steps) of the whole sheet.

    Raises:
        ValueError, OSError: there is nothing to draw, or as `generate`.
    """
    config = config or DrawConfig()
    named = _named(loras)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    empty = [name for name, values in (("prompt", prompts), ("weight", weights), ("seed", seeds)) if not len(values)]
    if empty:
        raise ValueError(f"there is no {empty[0]}; pass at least one")
    for lora in named.values():
        if isinstance(lora, str | Path):
            check_lora(lora)
    base = as_base(base)
    warn_of_prompts(base, [*prompts, config.negative])
    drawn, every = [], [(prompt, seed) for prompt in prompts for seed in seeds]
    # The base alone is the same at every weight.
    parts = [(name, weight) for name, lora in named.items() for weight in (weights if lora is not None else (None,))]
    report = _whole(progress, len(parts))
    for name, weight in parts:
        lora = named[name]
        file, factors = (lora, None) if isinstance(lora, str | Path) else (None, lora)
        images = generate(
            base, [prompt for prompt, _ in every], space, factors, [seed for _, seed in every],
            lora=file, weight=1.0 if weight is None else weight, progress=report(),
            **asdict(config),
        )  # fmt: skip
        digest = "" if file is None else describe(file).hashes["a1111"]
        for own in weights if weight is None else (weight,):
            mentioned = "" if lora is None else name
            for image, (prompt, seed) in zip(images, every, strict=True):
                text = infotext_of(base, prompt, seed, config, mentioned, own, digest)
                drawn.append(SheetPicture(image, name, own, prompt, seed, text))
    return Sheet(tuple(named), tuple(weights), tuple(prompts), tuple(seeds), tuple(drawn))


def generate_to_file(
    base: BaseModel,
    prompts: Sequence[str],
    out: str | Path,
    loras: Sequence[str | Path] = (),
    weights: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0,),
    config: DrawConfig | None = None,
    pictures: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw as `draw_sheet` does and write one picture, or a labelled sheet of several; returns the files.

    Args:
        pictures: a new folder for each picture by itself.
        overwrite: a file ``out`` may be replaced.

    Raises:
        ValueError, OSError: as `check_pictures` and `draw_sheet`.
    """
    check_pictures(out, base, loras, pictures, overwrite)
    return draw_sheet(base, prompts, loras, weights, seeds, config, progress=progress).save(out, pictures)


def check_pictures(
    out: str | Path,
    base: Base = "",
    loras: Sequence[str | Path] = (),
    pictures: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Raise ValueError or OSError now if pictures cannot be written to ``out``, or a LoRA is no usable one.

    Args:
        base: the base model, whose files are not to be written over.
        pictures: a folder for single pictures, which must not be there.
    """
    inputs = [*base_inputs(base), *loras]
    check_output(out, inputs, ".png", overwrite)
    if pictures is not None:
        check_output(pictures, inputs, FOLDER)
    for lora in loras:
        check_lora(lora)


def _named(loras: Mapping[str, SheetLora] | Sequence[str | Path]) -> dict[str, SheetLora]:
    """LoRAs by name; files of the same name are distinguished by their folders."""
    if isinstance(loras, Mapping):
        return dict(loras) or {BASE: None}
    paths = [loras] if isinstance(loras, str | Path) else list(loras)
    stems = [Path(path).stem for path in paths]
    named: dict[str, SheetLora] = {
        stem if stems.count(stem) == 1 else str(path): path for stem, path in zip(stems, paths, strict=True)
    }
    return named or {BASE: None}


def _whole(progress: Progress | None, parts: int) -> Callable[[], Progress | None]:
    """Return a function that gives each of ``parts`` drawings a progress of its own, that counts in the whole."""
    number = -1

    def report() -> Progress | None:
        nonlocal number
        number += 1
        if progress is None:
            return None
        part = number
        return lambda done, total: progress(part * total + done, parts * total)

    return report


def infotext_of(
    base: BaseModel, prompt: str, seed: int, config: DrawConfig, lora: str = "", weight: float = 1.0, digest: str = ""
) -> Infotext:
    """What a picture was drawn with, by A1111's names and in its order.

    Args:
        lora: the name of the LoRA; "" is none.
        digest: its file's hash, by which A1111 finds it.
    """
    name = sampler_name(make_sampler(base.scheduler, config.sampler))
    width, height = config.size or own_size(base)
    fields = {
        "Steps": str(config.num_steps),
        "Sampler": name.removesuffix(" Karras"),
        "Schedule type": "Karras" if name.endswith(" Karras") else "",
        "CFG scale": f"{own_guidance(base) if config.guidance is None else config.guidance:g}",
        "Seed": str(seed),
        "Size": f"{width}x{height}",
        "Model": Path(base.name).stem if base.name.endswith(".safetensors") else Path(base.name).name,
        "Clip skip": str(config.clip_skip) if config.clip_skip > 1 else "",
        "RNG": "CPU",
        "Lora hashes": f"{lora}: {digest}" if digest else "",
    }
    mention = f" <lora:{lora}:{weight:g}>" if lora else ""
    return Infotext(prompt + mention, config.negative, {key: value for key, value in fields.items() if value})


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], column_labels: Sequence[str], title: str = ""
) -> Image.Image:
    """Lay pictures out in labelled rows and columns; small pictures are enlarged without smoothing."""
    pictures = [picture for _, row in rows for picture in row]
    cell = tuple(max(_CELL_PX, *sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    font = ImageFont.load_default(size=_TEXT_PX)
    labels = [_wrap(label, font, cell[0]) for label in column_labels]
    columns = max(len(row) for _, row in rows)
    width = _LEFT_PX + columns * (cell[0] + _MARGIN_PX) + _MARGIN_PX
    title = _wrap(title, font, width - 2 * _MARGIN_PX)
    title_px = _LINE_PX * (title.count("\n") + 1) + _MARGIN_PX if title else 0
    top_px = title_px + _MARGIN_PX + _LINE_PX * max(label.count("\n") + 1 for label in labels)
    sheet = Image.new("RGB", (width, top_px + len(rows) * (cell[1] + _MARGIN_PX) + _MARGIN_PX), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.multiline_text((width // 2, (title_px + _MARGIN_PX) // 2), title, fill="black", font=font, anchor="mm",
                           align="center")  # fmt: skip
    for column, label in enumerate(labels):
        centre = _LEFT_PX + _MARGIN_PX + column * (cell[0] + _MARGIN_PX) + cell[0] // 2
        place = (centre, (title_px + top_px + _MARGIN_PX) // 2)
        pen.multiline_text(place, label, fill="black", font=font, anchor="mm", align="center")
    for number, (label, row) in enumerate(rows):
        top = top_px + _MARGIN_PX + number * (cell[1] + _MARGIN_PX)
        text, beside = _wrap(label, font, _LEFT_PX - 2 * _MARGIN_PX), (_LEFT_PX - 6, top + cell[1] // 2)
        pen.multiline_text(beside, text, fill="black", font=font, anchor="rm", align="right")
        for column, picture in enumerate(row):
            method = Image.Resampling.NEAREST if picture.width < cell[0] // 2 else Image.Resampling.LANCZOS
            shown = ImageOps.contain(picture.convert("RGB"), cell, method)
            left = _LEFT_PX + _MARGIN_PX + column * (cell[0] + _MARGIN_PX)
            sheet.paste(shown, (left + (cell[0] - shown.width) // 2, top + (cell[1] - shown.height) // 2))
    return sheet


def _stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Put sheets of one width below each other."""
    stacked = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, top))
        top += sheet.height
    return stacked


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """Break text into lines of at most ``width_px``, within words that are longer; lines of its own stay."""
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for word in line.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width_px:
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                    lines.append("")
                lines[-1] += letter
    return "\n".join(lines)
