"""`hdb personalize` in the open: dry runs, presets, faces, folders, intermediate LoRAs, stopping and resuming."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from skimage import data

from cli.options import PRESETS
from cli.personalize import Stop
from cli.progress import LastLoss, report_lines


@pytest.fixture
def no_base(monkeypatch):
    """Whoever loads a base fails."""

    def load(*arguments, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("hypernet.base_models.loading.load_base", load)


def test_a_dry_run_shows_the_crops_and_says_what_would_be_done(hdb, no_base, yunet):
    head = Image.fromarray(data.astronaut()).crop((100, 0, 350, 220))
    group = Image.new("RGB", (900, 500), "gray")
    group.paste(head.resize((187, 165)), (20, 20))
    group.paste(head.resize((500, 440)), (380, 30))
    Path("us").mkdir()
    group.save("us/group.png")
    Image.fromarray(data.coffee()).save("us/cup.png")
    output = hdb.run("personalize", "us", "--base", "testbed", "--hypernet", "none", "--dry-run", "--face", 1,
                     "--steps", 30, "--save-every", 10, "--preview-every", 15)  # fmt: skip
    assert hdb.files() == ["us", "us-crops.png", "us/cup.png", "us/group.png"]
    assert Image.open("us-crops.png").width > 2 * 512
    assert "left out: us/cup.png: no face found" in output
    assert 'would fit "a sks face" on testbed: 30 steps of finetuning' in output
    assert output.splitlines()[-1] == (
        "would write us.safetensors, us.json, us.png, us-000010.safetensors, us-000020.safetensors, us-000015.png, "
        "us-loss.png, us-sheet.png"
    )
    Path("us-sheet.png").write_text("somebody's")
    assert "us-sheet.png exists" in hdb.fail("personalize", "us", "--base", "testbed", "--dry-run", "--save-every", 10)


def test_what_is_for_one_person_is_refused_for_many(hdb, no_base):
    for option in (("--resume",), ("--dry-run",), ("--push-to-hub", "me/me")):
        message = hdb.fail("personalize", "--each", "faces", *option, code=2)
        assert f"{option[0]} is for one person" in message


def test_a_face_that_cannot_be_meant_is_named(hdb, no_base, portrait):
    assert "choose largest, leftmost, rightmost" in hdb.fail("personalize", portrait, "--face", "middle")


def test_nothing_to_resume_is_said_before_a_base_is_loaded(hdb, no_base, portrait):
    message = hdb.fail("personalize", portrait, "--base", "testbed", "--no-crop", "--resume", "--out", "me.safetensors")
    assert "me.hdb-state does not exist, so there is no fit to resume" in message


# ---- presets ----


@pytest.fixture
def seen(monkeypatch):
    """What `hdb personalize` is called with, instead of working."""
    import cli.personalize

    calls = []
    monkeypatch.setattr(cli.personalize.command, "callback", lambda **values: calls.append(values))
    return calls


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_file_of_options(hdb, seen, name):
    hdb.run("personalize", "me.jpg", "--preset", name)
    (values,) = seen
    for key, value in yaml.safe_load(PRESETS[name].read_text()).items():
        found = values[key]
        assert (",".join(f"{part:.1f}" for part in found) if key == "weights" else found) == value


def test_a_preset_yields_to_a_config_and_both_to_the_command_line(hdb, seen):
    Path("mine.yaml").write_text("steps: 7\nsave_every: 3\n")
    for order in (("--preset", "portrait-best", "--config", "mine.yaml"),
                  ("--config", "mine.yaml", "--preset", "portrait-best")):  # fmt: skip
        hdb.run("personalize", "me.jpg", *order, "--save-every", 5)
        values = seen.pop()
        assert (values["steps"], values["save_every"], values["preview_every"]) == (7, 5, 40)
    hdb.run("personalize", "me.jpg", "--preset", "portrait-fast", "--save-config", "again.yaml")
    before = seen.pop()
    hdb.run("personalize", "me.jpg", "--config", "again.yaml")
    assert seen.pop() == before
    assert "portrait-best" in hdb.fail("personalize", "me.jpg", "--preset", "portait-best", code=2)


# ---- while it runs ----


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_waits_for_the_step_and_the_second_does_not(ctrl_c):
    with Stop() as stop:
        with pytest.raises(KeyboardInterrupt):  # nothing is fitted yet
            signal.raise_signal(signal.SIGINT)
        stop.note(SimpleNamespace(step=1, steps=9))
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is ctrl_c


def test_the_loss_is_looked_at_once_a_second_and_stands_in_the_log(capsys):
    now, looks = [0.0], []

    class Report:
        def __init__(self, step):
            self.stage, self.step, self.steps = "finetune LoRA", step, 100

        @property
        def loss(self):
            looks.append(self.step)
            return 0.5 / self.step

    loss = LastLoss(lambda: now[0])
    report = report_lines(lambda: now[0], loss.read)
    for step in range(1, 101):
        now[0] += 0.3
        loss(Report(step))
        report("finetune LoRA", step, 100)
    assert looks == [*range(1, 100, 4), 100]
    assert loss.read("draw preview") is None
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("finetune LoRA: 68 of 100, loss 0.0077, in 0:00:20")


def test_intermediate_loras_are_written_and_a_stop_is_told(hdb, personalize, portrait, monkeypatch):
    monkeypatch.setattr(Stop, "__call__", lambda self: self._is_fitting and self.step == 3)
    note = Stop.note
    monkeypatch.setattr(Stop, "note", lambda self, report: (setattr(self, "step", report.step), note(self, report)))
    arguments = ("personalize", portrait, "--base", "testbed", "--hypernet", "none", "--start", "none", "--no-crop",
                 "--no-preview", "--steps", 4, "--preservation", 0, "--save-every", 2,
                 "--out", "me.safetensors")  # fmt: skip
    output = hdb.run(*arguments, code=130)
    assert "stopped after step 3 of finetune LoRA; run the same command with --resume to continue" in output
    assert hdb.files() == [
        "me-000002.json", "me-000002.safetensors", "me-000003.json", "me-000003.safetensors", "me.hdb-state",
    ]  # fmt: skip
    monkeypatch.undo()
    monkeypatch.chdir(hdb.folder)
    output = hdb.run(*arguments, "--resume")
    assert "wrote me.safetensors" in output
    assert "me.hdb-state" not in hdb.files()
    assert "me-loss.png" in hdb.files()
