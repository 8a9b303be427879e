"""One vocabulary for all commands: the same word is the same thing, older spellings work, files hold options."""

from dataclasses import fields

import click
import pytest
import yaml
from click.testing import CliRunner

from cli import train as train_module
from cli.main import COMMANDS, main
from cli.options import RENAMED, todays_spelling
from hypernet.recipe import TrainConfig


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
    # What to convert to and how, of files and of a photo's person, are other questions with the same word.
    differing = {text: found for text, found in kinds.items() if len(found) > 1}
    assert not differing.keys() & {
        "--steps", "--lr", "--timesteps-per-step", "--gradient-checkpointing", "--optimizer", "--seed",
        "--device", "--precision", "--hypernet", "--base", "--token", "--prompt", "--no-crop", "--rank",
        "--preservation", "--background",
    }  # fmt: skip


def test_what_an_out_of_memory_error_advises_works_in_every_command_that_trains():
    for command in ("personalize", "preoptimize", "train"):
        assert {"on", "off"} <= set(ALL[command]["--gradient-checkpointing"].type.choices)
        assert "--batch-size" in ALL[command]
        assert "bf16" in ALL[command]["--precision"].help


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


def test_every_field_of_the_training_is_an_option():
    reachable = {option.name for option in ALL["train"].values()} | {"crop"}  # --no-crop
    assert {field.name for field in fields(TrainConfig)} <= reachable


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
    config = {"out": "net", "steps": 7, "lr": 0.25, "accumulation": 3, "flip": True, "gradient-checkpointing": "on"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert run("faces", "--config", "mine.yaml", "--lr", 0.5).exit_code == 0
    (values,) = seen
    assert (values["steps"], values["lr"], values["accumulation"]) == (7, 0.5, 3)
    assert (values["flip"], values["gradient_checkpointing"], str(values["out"])) == (True, "on", "net")


def test_a_saved_config_is_the_run_again(seen):
    given = ("faces", "--out", "net", "--steps", 9, "--flip", "--tracker", "a", "--tracker", "b", "--max-vram", "4GB",
             "--preserve", "{} at sea", "--gradient-checkpointing", "--same-photo")  # fmt: skip
    assert run(*given, "--save-config", "saved.yaml").exit_code == 0
    assert run("faces", "--config", "saved.yaml").exit_code == 0
    first, second = seen
    assert first == second
    assert (first["trackers"], first["preserved"]) == (("a", "b"), ("{} at sea",))


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
