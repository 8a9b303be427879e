"""What all commands' options have in common: older spellings, and options from a file."""

import difflib
from pathlib import Path

import click

# Command -> older spelling -> today's. They work without being shown, and go with the next minor version.
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
    },
}


def todays_spelling(command: str, arguments: list[str]) -> list[str]:
    """Arguments with older spellings of a command's options replaced."""
    renamed = RENAMED.get(command, {})
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parts = [argument.partition("=") for argument in arguments[:end]]
    return ["".join((renamed.get(name, name), sign, value)) for name, sign, value in parts] + arguments[end:]


class ConfiguredCommand(click.Command):
    """A command with ``--config`` and ``--save-config``, of all of its other options."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        path = click.Path(dir_okay=False, path_type=Path)
        self.params += [
            click.Option(["--config"], type=path, is_eager=True, expose_value=False, callback=_read,
                         metavar="FILE.yaml",
                         help="Read options from this file; those on the command line override it."),
            click.Option(["--save-config"], type=path, metavar="FILE.yaml",
                         help="Write the options of this run to a file for --config."),
        ]  # fmt: skip

    def invoke(self, context: click.Context):
        path = context.params.pop("save_config")
        if path is not None:
            _write(path, context)
        return super().invoke(context)


def _keys(command: click.Command) -> dict[str, click.Option]:
    """The name of each option in a file: the one that is typed, with underscores."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    keys = {option.opts[-1].lstrip("-").replace("-", "_"): option for option in options}
    return {key: option for key, option in keys.items() if key not in ("config", "save_config", "help")}


def _read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise click.UsageError(f"--config {path} cannot be read ({first}); pass a YAML file") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise click.UsageError(f"--config {path} holds no options; write one a line, such as steps: 100")
    keys, renamed = _keys(context.command), RENAMED.get(context.info_name or "", {})
    values = {}
    for name, value in found.items():
        typed = f"--{str(name).replace('_', '-')}"
        key = renamed.get(typed, typed).lstrip("-").replace("-", "_")
        if key not in keys:
            (nearest,) = difflib.get_close_matches(key, keys, 1, 0)
            raise click.UsageError(f"{name!r} in {path} is not an option of {context.command_path}; did you mean "
                                   f"{nearest!r}?")  # fmt: skip
        values[keys[key].name] = value
    context.default_map = values


def _write(path: Path, context: click.Context) -> None:
    import yaml

    from lidb_peft.files import atomic_path
    from lidb_peft.outputs import check_output

    check_output(path, suffix=".yaml")
    values = {key: context.params[option.name] for key, option in _keys(context.command).items()
              if option.name in context.params}  # fmt: skip
    plain = {
        key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if value not in (None, ())
    }
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
