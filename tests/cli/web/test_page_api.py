"""What the page does, asked by the client that any program could use; what it looks like is in test_in_browser.py."""

import errno
import json
import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from cli.main import main
from cli.web.app import check_port
from cli.web.presets import CHOICES, read_preset
from cli.web.work_folder import file_name, find_lora_folder
from hypernet.recipe import PersonalizeConfig, changed

PROMPTS = "a sks face\na pencil drawing of a sks face"


def start(client, photos, steps=4, consent=True, base="testbed", preset="none", name="me", crop=False, run=""):
    return client.predict(
        photos, base, preset, name, PROMPTS, crop, "largest", steps, 0, 0, 2, consent, run, api_name="/start"
    )  # fmt: skip


def refusal(call, *arguments, **options) -> str:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def made(page, photo, finished):
    """A client and the key of a run that is done."""
    from gradio_client import Client

    client = Client(page[1], verbose=False)
    key = start(client, [photo])
    status = finished(client, key)
    assert status["state"] == "done", status
    return client, key


def test_a_photo_becomes_loras_of_several_steps_and_a_sheet(made, page):
    client, key = made
    status = client.predict(key, api_name="/status")
    assert status["steps_kept"] == [1, 2, 3, 4]
    assert [step for step, _ in status["losses"]] == [1, 2, 3, 4]
    shown, use, files = client.predict(key, 2, 0.8, api_name="/choose")
    assert len(shown) == 2
    assert [picture["caption"] for picture in shown] == PROMPTS.splitlines()
    assert "Step **2**, weight **0.8**." in use
    assert "`a sks face <lora:me-000002:0.8>`" in use
    names = [Path(file).name for file in files]
    assert names == ["me-000002.safetensors", "me-000002.json", "me-000002.png"]
    with safe_open(files[0], "pt") as lora:
        assert lora.keys()
    assert json.loads(Path(files[1]).read_text())["activation text"] == "a sks face"
    assert Path(client.predict(key, api_name="/sheet")).is_relative_to(page[0])


def test_steps_and_weights_differ_and_the_nearest_is_shown(made):
    client, key = made
    first, strong, weak = (client.predict(key, *at, api_name="/choose") for at in ((1, 1.0), (4, 1.0), (4, 0.6)))
    pictures = {Path(shown[0]["image"]).read_bytes() for shown, _, _ in (first, strong, weak)}
    assert len(pictures) == 3
    assert client.predict(key, 9000, 1.0, api_name="/choose")[1] == strong[1]


def test_the_lora_is_saved_where_a_program_looks_and_replaces_nothing(made, tmp_path):
    client, key = made
    for program, below in (("ComfyUI", "models/loras"), ("webui", "models/Lora")):
        (tmp_path / program / below).mkdir(parents=True)
        client.predict(key, 4, "anna", str(tmp_path / program), api_name="/install")
        found = sorted(file.name for file in (tmp_path / program / below).iterdir())
        assert found == ["anna.json", "anna.png", "anna.safetensors"]
    again = refusal(client.predict, key, 4, "anna", str(tmp_path / "webui"), api_name="/install")
    assert "anna.safetensors exists and is kept" in again
    assert "has no models/Lora or models/loras" in refusal(
        client.predict, key, 4, "anna", str(tmp_path), api_name="/install"
    )


def test_nothing_is_made_without_consent(client, photo):
    assert "tick the box" in refusal(start, client, [photo], consent=False)


def test_what_cannot_be_done_is_a_sentence(client, photo, finished, tmp_path):
    assert "there is no photo; drop at least one" in refusal(start, client, [])
    assert "at most 20 are allowed" in refusal(start, client, [photo] * 21)
    assert "no base model is chosen" in refusal(start, client, [photo], base=" ")
    status = finished(client, start(client, [photo], base=str(tmp_path / "nothing.safetensors")))
    assert status["state"] == "failed"
    assert "nothing.safetensors does not exist" in status["error"]
    assert "there is no such run" in refusal(client.predict, "guessed", api_name="/status")
    assert "there is no LoRA yet" in refusal(client.predict, "guessed", 1, 1.0, api_name="/choose")


def test_a_photo_that_is_none_is_named_and_what_remains_is_shown(client, photo, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "broken.png").write_bytes(b"no picture")
    squares, problems = client.predict(
        [photo, handle_file(str(tmp_path / "broken.png"))], False, "largest", api_name="/crops"
    )
    assert len(squares["value"] if isinstance(squares, dict) else squares) == 1
    text = problems["value"] if isinstance(problems, dict) else problems
    assert "broken.png is not an image that can be read" in text
    assert str(tmp_path) not in text


def test_a_photo_without_a_face_says_what_to_untick_before_and_after_start(client, finished, tmp_path):
    from gradio_client import handle_file

    Image.new("RGB", (96, 96), "green").save(tmp_path / "wall.png")
    wall = handle_file(str(tmp_path / "wall.png"))
    _, sentences = client.predict([wall], True, "largest", api_name="/crops")
    status = finished(client, start(client, [wall], crop=True))
    assert status["state"] == "failed"
    for text in (sentences["value"], status["error"]):
        assert "wall.png: no face found" in text
        assert 'untick "Find the face"' in text
        assert "--" not in text


def test_what_the_disk_has_no_room_for_is_told_and_not_begun(page, client, photo, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=9))
    before = list((page[0] / "uploads").iterdir())
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabcdefghijk\r\n--x--\r\n'
    request = urllib.request.Request(f"{page[1]}gradio_api/upload", body,
                                     {"Content-Type": "multipart/form-data; boundary=x"})  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 507
    assert caught.value.read().decode() == "the disk is full; free some space and try again"
    assert list((page[0] / "uploads").iterdir()) == before
    monkeypatch.undo()
    assert json.loads(urllib.request.urlopen(request).read())


def test_a_disk_that_fills_up_while_a_fit_runs_ends_it_in_a_sentence(client, photo, finished, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status = finished(client, start(client, [photo], steps=1))
    assert status["state"] == "failed"
    assert re.fullmatch(r"the disk is full: \S+ could not be written; free some space and try again", status["error"])


def test_a_second_start_waits_for_the_first_and_another_browser_queues_behind_it(page, photo, finished):
    from gradio_client import Client

    mine, theirs = (Client(page[1], verbose=False) for _ in range(2))
    first = start(mine, [photo], steps=300)
    assert "already; wait until it is done, or press Stop first" in refusal(start, mine, [photo], run=first)
    second = start(theirs, [photo], steps=1)
    assert theirs.predict(second, api_name="/status")["says"] == "waiting: 1 before this one"
    mine.close()  # its page is gone; the run goes on, and is found again by its key
    theirs.predict(first, api_name="/stop")
    assert finished(theirs, second)["state"] == "done"
    assert theirs.predict(first, api_name="/status")["state"] == "stopped"


def test_files_are_described_converted_resized_and_merged(client, made):
    from gradio_client import handle_file

    _, _, (lora, *_) = made[0].predict(made[1], 4, 1.0, api_name="/choose")
    sent = [handle_file(lora)]
    text, norms = client.predict(sent, api_name="/inspect")
    assert "kohya LoRA" in text
    assert norms
    (converted,), _ = client.predict(sent, "diffusers", "", api_name="/convert")
    with safe_open(converted, "pt") as file:
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in file.keys())  # noqa: SIM118
    (archive,), _ = client.predict(sent, "peft", "", api_name="/convert")
    assert archive.endswith(".zip")
    files, text = client.predict(sent, 1, 0, api_name="/resize")
    assert "layers miss" in text
    assert Path(files[0]).stat().st_size < Path(lora).stat().st_size
    (merged, *_), _ = client.predict([handle_file(lora)] * 2, "0.8, 0.5", 0, api_name="/merge")
    assert Path(merged).name == "merged.safetensors"
    assert "write a weight for each" in refusal(client.predict, sent, "1, 2", 0, api_name="/merge")


def test_a_file_that_is_no_lora_is_told(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "other.safetensors").write_bytes(b"no safetensors file at all")
    told = refusal(client.predict, [handle_file(str(tmp_path / "other.safetensors"))], api_name="/inspect")
    assert "other.safetensors" in told
    assert "bug in the program" not in told


def test_a_preset_says_which_steps_are_kept_and_which_weights_are_drawn():
    fast = read_preset("portrait-fast")
    assert fast.recipe == {"steps": 40}
    assert fast.every(40) == (10, 10)
    assert fast.every(8) == (2, 2)  # the miniature's steps are fewer than those between two LoRAs
    assert fast.weights == (0.7, 1.0)
    assert read_preset("none").every(80) == (20, 20)
    for label, name in CHOICES:
        changed(PersonalizeConfig(), read_preset(name).recipe)
        assert label != name  # people are told what it is for
    with pytest.raises(ValueError, match="choose none, "):
        read_preset("other")


@pytest.mark.parametrize("preset", ["6gb", "portrait-best"])
def test_a_preset_works_on_the_page(client, photo, finished, preset):
    key = start(client, [photo], steps=1, preset=preset)
    status = finished(client, key)
    assert (status["state"], status["steps_kept"]) == ("done", [1]), status


def test_many_people_get_a_lora_each_and_it_is_told_who_does_not(client, photo, finished, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = handle_file(str(tmp_path / "broken.png"))
    key = client.predict([photo, broken], "", "testbed", False, 1, True, "", api_name="/start_people")
    assert finished(client, key)["state"] == "done"
    people = client.predict(key, api_name="/people")
    assert [Path(file).name for file in people["loras"]] == ["portrait.safetensors"]
    assert people["people"]["portrait.png"] == "LoRA is ready"
    assert people["people"]["broken.png"].startswith("broken.png is not an image")


@pytest.mark.parametrize("path", ["/etc/hostname", "{cwd}/README.md", "{work}/../secret.txt"])
def test_no_file_outside_of_the_work_folder_is_served(page, path):
    folder, address = page
    (folder.parent / "secret.txt").write_text("secret")
    path = path.format(cwd=Path.cwd(), work=folder)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}gradio_api/file={path}")
    assert caught.value.code in (403, 404)


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use, .*--port {port + 1}"):
            check_port("127.0.0.1", port)


def test_the_command_tells_of_a_port_in_use_in_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(
            main, ["ui", "--port", str(taken.getsockname()[1]), "--work-dir", str(tmp_path / "w")]
        )
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith("Error: port ")
    assert not (tmp_path / "w").exists()


def test_the_command_says_what_is_missing_and_its_help_is_instant(monkeypatch):
    monkeypatch.setattr("cli.ui.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["ui", "--base", "testbed"])
    assert result.exit_code == 1
    assert "pip install 'gradio>=6.2,<7'" in result.output


def test_names_become_file_names():
    assert file_name(' a/b:c"? ') == "a-b-c--"
    assert file_name("...") == "me"
    assert not re.search(r"[<>:]", file_name("<lora:x:1>"))


def test_the_folder_itself_may_be_named(tmp_path):
    folder = tmp_path / "models" / "loras"
    folder.mkdir(parents=True)
    assert find_lora_folder(folder) == find_lora_folder(tmp_path) == folder
