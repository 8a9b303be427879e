import time

from cli.progress import progress_bars


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
