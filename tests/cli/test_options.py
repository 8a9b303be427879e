"""One vocabulary for all commands: the same word is the same thing, older spellings work, files hold options."""

import json
from dataclasses import fields, is_dataclass

import click
import pytest
import yaml
from click.testing import CliRunner

from cli import train as train_module
from cli.main import COMMANDS, main
from cli.options import RENAMED, SECTIONS, field_docs, todays_spelling
from hypernet import recipe
from hypernet.base_models.config import BaseConfig
from hypernet.recipe import EvaluationConfig, FitConfig, NetworkConfig, PersonalizeConfig, StartConfig, TrainConfig
from hypernet.sheets import DrawConfig
from lidb_peft.families import FAMILIES


def options_of(name):
    command = main.get_command(click.Context(main), name)
    return {text: option for option in command.params if isinstance(option, click.Option) for text in option.opts}


ALL = {name: options_of(name) for name in COMMANDS}


def test_an_option_of_several_commands_is_the_same_in_all():
    kinds = {}
    for command, options in ALL.items():
        for text, option in options.items():
            if text.startswith("--"):
                kinds.setdefault(text, {}).setdefault((option.type.name, option.is_flag), []).append(command)
    differing = {text for text, found in kinds.items() if len(found) > 1}
    # A file or a folder, whichever the command makes; and memory decides how many are fitted at once, not trained on.
    assert differing == {"--out", "--batch-size"}


def test_what_an_out_of_memory_error_advises_works_in_every_command_that_trains():
    for command in ("personalize", "preoptimize", "train"):
        assert {"on", "off"} <= set(ALL[command]["--gradient-checkpointing"].type.choices)
        assert "--batch-size" in ALL[command]
        assert "bf16" in ALL[command]["--precision"].type.choices


def test_older_spellings_work_and_are_not_shown():
    for command, renamed in RENAMED.items():
        shown = CliRunner().invoke(main, [command, "--help"]).output.split()
        for old, new in renamed.items():
            assert new in ALL[command]
            assert old not in ALL[command]
            assert old not in shown
            assert todays_spelling(command, [old, "1", f"{old}=2", "x"]) == [new, "1", f"{new}=2", "x"]
    assert todays_spelling("generate", ["--", "--num-steps"]) == ["--", "--num-steps"]
    assert todays_spelling("doctor", ["--batch"]) == ["--batch"]


@pytest.mark.parametrize(
    ("command", "config"),
    [("train", TrainConfig), ("train", NetworkConfig), ("train", BaseConfig), ("personalize", PersonalizeConfig),
     ("personalize", BaseConfig), ("preoptimize", BaseConfig), ("learn-start", StartConfig),
     ("learn-start", BaseConfig), ("eval", EvaluationConfig), ("eval", BaseConfig), ("ui", BaseConfig)],
)  # fmt: skip
def test_every_field_of_a_config_is_an_option_with_its_own_documentation(command, config):
    options = {option.name: option for option in ALL[command].values()}
    docs = field_docs(config)
    assert set(docs) == {field.name for field in fields(config)} <= set(options)
    for name, text in docs.items():
        words = text.replace("`", "").split(". ")[0].rstrip(".").split()
        assert options[name].help.lower().startswith(" ".join(words).lower()), name


def test_every_field_of_a_fit_can_be_reached():
    theirs = {field.name for field in fields(FitConfig)}
    assert theirs <= {option.name for option in ALL["personalize"].values()}


CONFIGURED = {name for name, options in ALL.items() if "--config" in options}
CONFIGS = [config for config in vars(recipe).values() if is_dataclass(config)] + [BaseConfig, DrawConfig]


def test_every_command_that_fills_a_config_takes_a_file_of_options():
    filling = {
        command
        for command, options in ALL.items()
        for config in CONFIGS
        if {field.name for field in fields(config)} <= {option.name for option in options.values()}
    }
    assert filling >= {"personalize", "preoptimize", "train", "learn-start", "eval", "generate", "ui"}
    assert filling <= CONFIGURED
    assert CONFIGURED == {name for name, options in ALL.items() if "--save-config" in options} == set(ROUND_TRIPS)


@pytest.mark.parametrize("command", sorted(CONFIGURED - {"ui", "prepare"}))
def test_help_has_sections_and_begins_with_the_everyday_ones(command):
    shown = CliRunner().invoke(main, [command, "--help"]).output
    titles = [title for title in SECTIONS if f"\n{title}:\n" in shown]
    places = [shown.index(f"\n{title}:\n") for title in titles]
    assert titles[0] == "Everyday"
    assert places == sorted(places)
    assert len(titles) > 2
    assert "\nOptions:\n" not in shown
    assert shown.index("--base") < shown.index("\n", places[1] + 1)


def test_no_section_names_what_is_no_option_of_any_command():
    named = [word for words in SECTIONS.values() for word in words.split()]
    known = {text.removeprefix("--") for options in ALL.values() for text in options} | {"help"}
    assert len(set(named)) == len(named)
    assert set(named) <= known


@pytest.mark.parametrize("command", ["convert", "resize", "merge"])
def test_help_lists_the_families(command):
    assert f"--family {'|'.join(FAMILIES)}" in " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What `hdb train` is called with, instead of training."""
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(train_module.command, "callback", lambda **values: calls.append(values))
    return calls


def run(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_a_config_file_gives_options_and_the_command_line_overrides_them(seen, tmp_path):
    config = {"out": "net", "steps": 7, "lr": 0.25, "accumulation": 3, "flip": True, "gradient-checkpointing": "on",
              "no_crop": True}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert run("faces", "--config", "mine.yaml", "--lr", 0.5).exit_code == 0
    (values,) = seen
    assert (values["steps"], values["lr"], values["gradient_accumulation_steps"]) == (7, 0.5, 3)
    assert (values["flip"], values["gradient_checkpointing"], str(values["out"])) == (True, "on", "net")
    assert values["crop"] is False


@pytest.mark.parametrize("name", ["saved.yaml", "saved.json"])
def test_a_saved_config_is_the_run_again(seen, tmp_path, name):
    given = ("faces", "--out", "net", "--steps", 9, "--flip", "--tracker", "a", "--tracker", "b", "--max-vram", "4GB",
             "--preserve", "{} at sea", "--gradient-checkpointing", "--same-photo", "--no-crop")  # fmt: skip
    assert run(*given, "--save-config", name).exit_code == 0
    assert run("faces", "--config", name).exit_code == 0
    if name.endswith(".json"):
        assert json.loads((tmp_path / name).read_text())["steps"] == 9
    first, second = seen
    assert first == second
    assert (first["trackers"], first["preserved"]) == (("a", "b"), ("{} at sea",))


# Command -> options of every type it has.
ROUND_TRIPS = {
    "personalize": ("--adapt", "denoiser", "--no-crop", "--preserve", "{} at sea", "--graph", "off", "--weights",
                    "0.5,1"),
    "preoptimize": ("--out", "targets", "--lr", 0.25, "--batch-size", 3, "--max-vram", "4GB"),
    "train": ("--out", "net", "--flip", "--tracker", "a", "--encoder", "b"),
    "learn-start": ("--out", "start.safetensors", "--rounds", 3, "--rate", 0.5, "--token", "ohwx"),
    "prepare": ("--out", "prepared", "--part", "3/8", "--face", "2"),
    "generate": ("--lora", "a.safetensors", "--lora", "b.safetensors", "--weights", "0.5,1", "--seeds", "1,2", "--size",
                 "96x64", "--sampler", "Euler a", "--pictures", "all", "--revision", "fp16"),
    "eval": ("--methods", "ours,dreambooth", "--baseline", "lora_steps=3", "--baseline", "lora_lr=0.5", "--baseline",
             "inversion_start=man", "--people", 5, "--num-seeds", 2, "--prompts", "prompts.txt", "--no-crop"),
    "ui": ("--work-dir", "results", "--port", 0, "--no-browser", "--precision", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "given"), ROUND_TRIPS.items())
@pytest.mark.parametrize("file", ["a.yaml", "a.json"])
def test_every_command_with_a_config_reads_what_it_has_saved(command, given, file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    found = main.get_command(click.Context(main), command)
    monkeypatch.setattr(found, "callback", lambda *_, **values: calls.append(values))
    inputs = [] if command == "ui" else ["faces"]
    for arguments in ((), (*given, "--save-config", file), ("--config", file)):
        result = CliRunner().invoke(main, [command, *inputs, *map(str, arguments)])
        assert result.exit_code == (0 if arguments or "--out" not in given else 2), result.output
    *default, saved, read = calls
    assert saved == read
    assert saved not in default


@pytest.mark.parametrize(
    ("command", "text", "name", "value"),
    [
        ("generate", "weights: [0.5, 1]", "weights", (0.5, 1.0)),
        ("generate", "seeds: 3", "seeds", (3,)),
        ("eval", "methods: [ours, dreambooth]", "methods", ("ours", "dreambooth")),
        ("eval", "baseline: [lora_steps=3]", "baselines", (("lora_steps", 3),)),
    ],
)
def test_lists_in_a_file_are_lists_of_values(command, text, name, value, monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    calls = []
    monkeypatch.setattr(
        main.get_command(click.Context(main), command), "callback", lambda **values: calls.append(values)
    )
    result = CliRunner().invoke(main, [command, "x", "--config", str(tmp_path / "a.yaml")])
    assert result.exit_code == 0, result.output
    assert calls[0][name] == value


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("prepare", "{out: a, part: 3}", "'3' is not a part"),
        ("generate", "size: [96, 64]", "[96, 64] is not a size"),
        ("generate", "weights: [a]", "['a'] is not a list of numbers"),
        ("eval", "methods: 3", "'3' is not a method"),
        ("eval", "baseline: [3]", "is not NAME=VALUE"),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_file_is_refused_in_a_sentence(command, text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    result = CliRunner().invoke(main, [command, "x", "--config", str(tmp_path / "a.yaml")])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "'stepz' in bad.yaml is not an option of main train; did you mean 'steps'?"),
        ("steps: many", "'many' is not a valid integer"),
        ("- steps", "--config bad.yaml holds no options"),
        ("steps: [", "--config bad.yaml cannot be read"),
    ],
)
def test_a_config_file_with_a_fault_is_refused_in_a_sentence(seen, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    result = run("faces", "--out", "net", "--config", "bad.yaml")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert seen == []
