"""Shared machinery of options: config fields as options, help sections, older spellings, option files."""

import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from hypernet.recipe import AUTO


class FolderOrUrl(click.Path):
    """A folder, or the URL of one, which stays as it is written."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value, param, ctx):
        return value if "://" in str(value) else super().convert(value, param, ctx)


class MemorySize(click.ParamType):
    """``4GB``, ``3.5 GB``, ``800MB`` in bytes."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):  # bytes, from a saved config
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])B?", str(value), flags=re.IGNORECASE)
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a size; write it as 4GB or 800MB", param, ctx)
        return round(float(match[1]) * {"G": 1e9, "M": 1e6}[match[2].upper()])


# Command -> older spelling -> current one. Older spellings work but are hidden; the next minor version drops them.
RENAMED = {
    "generate": {"--num-steps": "--steps", "--weight": "--weights"},
    "preoptimize": {"--timesteps": "--timesteps-per-step", "--init-from": "--hypernet", "--batch": "--batch-size"},
    "learn-start": {"--timesteps": "--timesteps-per-step"},
    "personalize": {"--batch": "--batch-size"},
    "train": {
        "--init-from": "--hypernet",
        "--batch": "--batch-size",
        "--accumulation": "--gradient-accumulation-steps",
        "--schedule": "--lr-scheduler",
        "--workers": "--num-workers",
        "--rounds": "--k",
        "--weights": "--target-distance",
    },
}


def todays_spelling(command: str, arguments: list[str]) -> list[str]:
    """Replace older spellings of a command's options by the current ones."""
    renamed = RENAMED.get(command, {})
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parts = [argument.partition("=") for argument in arguments[:end]]
    return ["".join((renamed.get(name, name), sign, value)) for name, sign, value in parts] + arguments[end:]


# Section title -> options in display order, of all commands; options not listed come under "Further".
SECTIONS = {
    "Everyday": "preset base hypernet methods lora reference trigger weights out each targets resume steps "
                "rank save-every preview preview-every no-preview dry-run overwrite seed",
    "Fit": "lr theta-steps theta-lr warmup-steps lr-scheduler weight-decay max-grad-norm ema-decay optimizer "
           "batch-size gradient-accumulation-steps adapt start rounds people inner-steps rate token prompt",
    "Loss": "denoising target-distance compare preservation preserve background timesteps-per-step max-timestep "
            "deep-supervision caption-dropout same-photo",
    "Hypernetwork": "encoder train-encoder learned-bases k hidden-size num-hidden-layers num-attention-heads",
    "Photos": "resolution part moments crop face face-detector flip jitter streaming cache num-workers validation "
              "validation-images",
    "Speed and memory": "device precision gradient-checkpointing graph attention compile quantize max-vram",
    "Pictures": "negative size sampler sampling-steps guidance clip-skip num-images seeds pictures prompts",
    "Evaluation": "num-seeds face-network dino clip baseline",
    "Base model": "components prediction revision train-text-encoder guidance-scale",
    "Share": "push-to-hub",
    "LiDB weights": "save-theta from-theta",
    "Progress": "log-every checkpoint-every tracker",
    "Further": "",
    "Options in a file": "config save-config help",
}  # fmt: skip
_FURTHER = "Further"
# For fields whose type hint does not determine the option's type.
_TYPES = {"max_vram": MemorySize(), "components": click.Path(file_okay=False)}
_METAVARS = {"base": "ID|DIR|FILE|testbed", "components": "DIR", "revision": "BRANCH|TAG|COMMIT", "max_vram": "SIZE",
             "preserved": "PROMPT", "encoder": "ID|DIR"}  # fmt: skip


def field_docs(config: type) -> dict[str, str]:
    """The documentation of each field in a config's docstring, by name."""
    docs: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(config) or "").partition("Attributes:\n")[2].splitlines():
        if entry := re.match(r" {4}(\w+): (.+)", line):
            name, docs[entry[1]] = entry[1], entry[2]
        elif name and line.startswith(" " * 8):
            docs[name] += " " + line.strip()
        else:
            break
    return docs


def _help(text: str) -> str:
    """The first sentence of a field's documentation, as help text."""
    first = text.replace("``", "").split(". ")[0].rstrip(".")
    return f"{first[0].upper()}{first[1:]}."


def field_option(
    config: type, name: str, flag: str = "", is_left_open: bool = False, shown: str = "", text: str = ""
) -> Callable:
    """The option for one config field, with the field's name, default, range and documentation.

    Args:
        flag: name of the option, if not the field's.
        is_left_open: default to None, for fields whose default depends on the base model or hypernetwork.
        shown: the default as shown in help.
        text: help text, instead of the field's documentation.
    """
    known = next(each for each in fields(config) if each.name == name)
    hint = typing.get_type_hints(config)[name]
    hint = (
        next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint) if _is_optional(hint) else hint
    )
    flag = flag or "--" + name.replace("_", "-")
    options: dict[str, Any] = {"help": text or _help(field_docs(config)[name]), "metavar": _METAVARS.get(name)}
    options["default"] = None if is_left_open else known.default
    options["show_default"] = shown or known.default is not None
    if hint is bool:
        is_switch = known.default is False
        return click.option(flag if is_switch else f"{flag}/--no-{flag[2:]}", name, **options | (
            {"is_flag": True} if is_switch else {}))  # fmt: skip
    if typing.get_origin(hint) is tuple:
        shown = shown or f"{len(known.default)} prompts"
        return click.option(flag, name, multiple=True, **options | {"show_default": shown,
                            "help": options["help"].rstrip(".") + "; may be repeated."})  # fmt: skip
    if known.metadata.get("choices") == AUTO:  # the name alone is on
        options |= {"is_flag": False, "flag_value": "on"}
    return click.option(flag, name, type=_TYPES.get(name) or _kind(hint, known.metadata), **options)


def config_options(config: type, only: Iterable[str], flags: Mapping[str, str] = MappingProxyType({})) -> Callable:
    """A decorator that adds options for some fields of a config."""

    def add(command):
        for name in reversed(list(only)):
            command = field_option(config, name, flags.get(name, ""))(command)
        return command

    return add


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _kind(hint: type, allowed: Mapping[str, Any]) -> Any:
    if allowed.get("choices"):
        return click.Choice(allowed["choices"])
    least, most, above, below = (allowed.get(name) for name in ("least", "most", "above", "below"))
    if hint is int and (least is not None or most is not None):
        return click.IntRange(least, most)
    if hint is float and (least is not None or above is not None):
        return click.FloatRange(
            above if least is None else least, below if most is None else most, min_open=least is None,
            max_open=most is None and below is not None,
        )  # fmt: skip
    return hint


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""The files of ``--preset``, by name, in the format of ``--config``."""


class Command(click.Command):
    """A command whose help groups its options into sections, everyday ones first.

    The options can be read from and saved to a file (``--config``, ``--save-config``).

    Args:
        presets: add ``--preset`` too.
    """

    def __init__(self, *arguments, presets: bool = False, **options) -> None:
        super().__init__(*arguments, **options)
        if presets:
            self.params.append(
                click.Option(["--preset"], type=click.Choice(list(PRESETS)), is_eager=True, expose_value=False,
                             callback=_read_preset,
                             help="Predefined set of options (files in cli/presets); --config and the command line "
                                  "override them.")
            )  # fmt: skip
        path = click.Path(dir_okay=False, path_type=Path)
        self.params += [
            click.Option(["--config"], type=path, is_eager=True, expose_value=False, callback=_read,
                         metavar="FILE.yaml|json",
                         help="Read options from this file; the command line overrides it."),
            click.Option(["--save-config"], type=path, metavar="FILE.yaml|json",
                         help="Save the options of this run to a file that --config can read."),
        ]  # fmt: skip

    def invoke(self, context: click.Context):
        path = context.params.pop("save_config")
        if path is not None:
            _write(path, context)
        return super().invoke(context)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        places = {word: (title, place) for title, words in SECTIONS.items() for place, word in enumerate(words.split())}
        found: dict[str, list[tuple[int, tuple[str, str]]]] = {}
        for option in self.get_params(context):
            record = option.get_help_record(context) if isinstance(option, click.Option) else None
            if record is not None:
                title, place = places.get(option.opts[-1].lstrip("-"), (_FURTHER, 0))
                found.setdefault(title, []).append((place, record))
        for title in SECTIONS:
            if title in found:
                with formatter.section(title):
                    formatter.write_dl([record for _, record in sorted(found[title], key=lambda entry: entry[0])])


def _keys(command: click.Command) -> dict[str, click.Option]:
    """The options by their name in a file: the flag with underscores."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    keys = {option.opts[-1].lstrip("-").replace("-", "_"): option for option in options}
    return {key: option for key, option in keys.items() if key not in ("config", "save_config", "preset", "help")}


def _read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_options_of(context, path)}


def _read_preset(context: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None:
        context.default_map = {**_options_of(context, PRESETS[name]), **(context.default_map or {})}


def _options_of(context: click.Context, path: Path) -> dict[str, object]:
    """Read the options in a file into the form of click's ``default_map``."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise click.UsageError(f"--config {path} cannot be read ({first}); pass a YAML or JSON file") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise click.UsageError(f"--config {path} holds no options; write one per line, such as steps: 100")
    keys, renamed = _keys(context.command), RENAMED.get(context.info_name or "", {})
    values = {}
    for name, value in found.items():
        typed = f"--{str(name).replace('_', '-')}"
        key = renamed.get(typed, typed).lstrip("-").replace("-", "_")
        if key.startswith("no_") and isinstance(value, bool) and key not in keys:  # --no-crop
            key, value = key.removeprefix("no_"), not value
        if key not in keys:
            (nearest,) = difflib.get_close_matches(key, keys, 1, 0)
            raise click.UsageError(f"{name!r} in {path} is not an option of {context.command_path}; did you mean "
                                   f"{nearest!r}?")  # fmt: skip
        values[keys[key].name] = value
    return values


def _write(path: Path, context: click.Context) -> None:
    import yaml

    from lidb_peft.files import atomic_path
    from lidb_peft.outputs import check_output

    is_json = path.suffix.lower() == ".json"
    check_output(path, suffix=".json" if is_json else ".yaml")
    options = _keys(context.command)
    values = {key: context.params[option.name] for key, option in options.items() if option.name in context.params}
    plain = {key: _plain(options[key], value) for key, value in values.items() if value not in (None, ())}
    text = json.dumps(plain, indent=1) if is_json else yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _plain(option: click.Option, value: Any) -> Any:
    """An option's value as YAML holds it: a number, a text as on the command line, or a list of those."""
    as_text = getattr(option.type, "as_text", lambda each: str(each) if isinstance(each, Path) else each)
    return [as_text(each) for each in value] if option.multiple else as_text(value)
