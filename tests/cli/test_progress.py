import re
import time

from cli.progress import progress_bars, report_lines


def test_bars_say_how_many_an_hour_not_counting_what_was_there(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bars(per_hour="people") as report:
        for done in (1000, 1001, 1002):
            report("fit people", done, 2000)
            time.sleep(0.05)
    shown = capsys.readouterr().err
    assert "1002/2000" in shown
    speed = int(shown.split(" people/h")[0].split()[-1].replace(",", ""))
    assert 0 < speed < 3600 / 0.05


def test_a_line_says_the_loss_so_far_once_there_is_one(capsys):
    now, losses = iter([0, 25, 50]), iter([None, 0.12345])
    report = report_lines(clock=lambda: next(now), read_loss=lambda stage: next(losses))
    for done in (0, 50, 100):
        report("train", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "train: 50 of 100 in 0:00:25, 0:00:25 left",
        "train: 100 of 100, loss 0.1235, in 0:00:50, 0:00:00 left",
    ]


def test_off_a_terminal_a_line_every_so_often_says_steps_and_time_left(capsys):
    now = iter([0, 5, 25, 30, 50])
    report = report_lines(clock=lambda: next(now))
    for done in (0, 10, 50, 60, 100):
        report("train", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "train: 50 of 100 in 0:00:25, 0:00:25 left",
        "train: 100 of 100 in 0:00:50, 0:00:00 left",
    ]


def test_a_person_s_fit_tells_its_loss_off_a_terminal(hdb, personalize, portrait, monkeypatch):
    monkeypatch.setattr("cli.progress._LINE_EVERY_S", 0.0)
    output = hdb.run(*personalize(portrait), "--steps", 3, "--out", "me.safetensors")
    assert re.search(r"^finetune LoRA: 3 of 3, loss \d\.\d{4}, in 0:", output, re.MULTILINE)
