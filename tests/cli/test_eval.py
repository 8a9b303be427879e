"""`hdb eval` on the miniature's people: tables, resumption, LoRA files, and what is wrong in a sentence."""

import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from hypernet import comparison
from testbed.protocol import photo

QUICK = (
    "--base", "testbed", "--no-crop", "--steps", 1, "--dino", "none", "--clip", "none", "--prompts", "prompts.txt",
    "--sampling-steps", 1, "--num-images", 1, "--out", "out",
)  # fmt: skip
FAST_BASELINES = tuple(
    part
    for name in ("dreambooth_steps", "lora_steps", "inversion_steps", "class_pictures")
    for part in ("--baseline", f"{name}=1")
)


@pytest.fixture
def people(hdb):
    """Three people with two photos each, and two prompts."""
    for person in range(3):
        folder = hdb.folder / "people" / f"p{person}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(photo(900_000 + person, number)).save(folder / f"{number}.png")
    (hdb.folder / "prompts.txt").write_text("# two\n{} in snow\na neon sign of {}\n")
    return "people"


def scores(hdb) -> list[dict]:
    lines = [json.loads(line) for line in (hdb.folder / "out" / "results.jsonl").read_text().splitlines()]
    assert "settings" in lines[0]
    return lines[1:]


def test_every_method_is_scored_on_every_person_and_pictures_are_kept(hdb, people):
    printed = hdb.run("eval", people, *QUICK, *FAST_BASELINES, "--people", 2)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][1:]
    assert rows == [*comparison.METHODS, comparison.REAL, comparison.STRANGERS]
    found = scores(hdb)
    assert [(line["row"], line["person"]) for line in found] == [
        (method, person) for method in comparison.METHODS for person in ("p0", "p1")
    ]
    assert all({"face_rec", "found", "no_face", "seconds"} <= set(line) for line in found)
    kept = hdb.folder / "out" / "pictures" / "dreambooth" / "0001-p1" / "seed-0"
    assert sorted(file.name for file in kept.iterdir()) == ["00-0.png", "01-0.png", "02-0.png"]
    summary = json.loads((hdb.folder / "out" / "results.json").read_text())
    assert summary["settings"]["models"]["face"]["revision"].startswith("sha256:")
    row = summary["rows"]["ours"]["face_rec"]
    assert row["mean"] == pytest.approx(sum(x["face_rec"] for x in found if x["row"] == "ours") / 2)
    assert row["people"] == 2
    assert (hdb.folder / "out" / "table.md").read_text().strip() in printed
    assert (hdb.folder / "out" / "sheet.png").is_file()


def test_a_run_that_was_stopped_goes_on_with_who_is_missing(hdb, people, monkeypatch):
    arguments = ("eval", people, *QUICK, "--methods", "only-hypernetwork")
    hdb.run(*arguments)
    whole = scores(hdb)
    shutil.rmtree(hdb.folder / "out")
    score, judged = comparison.PeopleBench.score, []

    def stop_at_the_second(bench, pictures, names):
        if judged:
            raise KeyboardInterrupt
        judged.extend(names)
        return score(bench, pictures, names)

    monkeypatch.setattr(comparison.PeopleBench, "score", stop_at_the_second)
    hdb.run(*arguments, code=1)
    assert [line["person"] for line in scores(hdb)] == ["p0"]
    monkeypatch.setattr(comparison.PeopleBench, "score", lambda bench, pictures, names: (
        judged.extend(names) or score(bench, pictures, names)
    ))  # fmt: skip
    hdb.run(*arguments)
    assert judged == ["p0", "p1", "p2"]
    resumed = scores(hdb)
    assert all(line.pop("seconds") for line in whole + resumed)
    assert resumed == whole


def test_results_of_another_run_are_kept(hdb, people):
    arguments = ("eval", people, *QUICK, "--methods", "only-hypernetwork", "--people", 2)
    hdb.run(*arguments)
    before = (hdb.folder / "out" / "results.jsonl").read_bytes()
    (hdb.folder / "prompts.txt").write_text("{} in snow\n")
    message = hdb.run(*arguments, code=1)
    assert 'is of another run: its prompts is ["{} in snow", "a neon sign of {}"]' in message
    assert "choose another output folder" in message
    assert (hdb.folder / "out" / "results.jsonl").read_bytes() == before


def test_a_row_of_other_steps_is_kept_and_other_rows_are_added(hdb, people):
    arguments = ("eval", people, *QUICK, "--people", 2, "--methods")
    hdb.run(*arguments, "no-hypernetwork")
    before = scores(hdb)
    message = hdb.run(*arguments, "no-hypernetwork", "--steps", 2, code=1)
    assert "is of another run: its row 'no-hypernetwork' is {\"steps\": 1" in message
    hdb.run(*arguments, "only-hypernetwork")
    assert scores(hdb)[: len(before)] == before
    settings = json.loads((hdb.folder / "out" / "results.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["rows"].keys() == {"no-hypernetwork", "only-hypernetwork"}
    assert settings["rows"]["only-hypernetwork"]["hypernetwork"]


def test_lora_files_of_anybody_are_judged_by_photos(hdb, people, made):
    shutil.copy(made / "me.safetensors", "me.safetensors")
    printed = hdb.run("eval", "--lora", "me.safetensors", "--reference", "people/p0/0.png", *QUICK)
    assert "| me | 1 | 1 |" in printed
    (line,) = scores(hdb)
    assert (line["row"], line["person"]) == ("me", "person")
    assert "found" not in line  # there is nobody else
    assert (hdb.folder / "out" / "pictures" / "me" / "0000-person" / "seed-0" / "02-0.png").is_file()
    state = load_file("me.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, "me.safetensors")
    message = hdb.run("eval", "--lora", "me.safetensors", "--reference", "people/p0/0.png", *QUICK, code=1)
    assert "is of another run: its row 'me' is" in message


def test_what_is_wrong_is_said_before_anything_is_fitted(hdb, people, made):
    run = ("eval", people, *QUICK)
    assert "'magic' is not a method; choose from ours, only" in hdb.fail(*run, "--methods", "magic", code=2)
    message = hdb.fail(*run, "--methods", "ours", "--hypernet", "none")
    assert message.startswith("ours: there is no hypernetwork for testbed to start from; pass --hypernet")
    assert "the DINO 'nobody/dino' is not a folder here" in hdb.fail("eval", people, *QUICK, "--dino", "nobody/dino")
    assert "did you mean 'lora_steps'?" in hdb.fail(*run, "--baseline", "lora_step=3")
    assert "no folder of PEOPLE" not in hdb.fail("eval", *QUICK, code=2)
    assert "--lora requires --reference" in hdb.fail("eval", "--lora", "x.safetensors", *QUICK, code=2)
    shutil.rmtree(hdb.folder / people / "p1")
    shutil.rmtree(hdb.folder / people / "p2")
    assert "people has 1 people that can be used, and a table needs 2 or more" in hdb.fail(*run)


def test_a_lora_of_another_base_is_refused(hdb, people, tmp_path_factory):
    import torch

    save_file({f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_{end}.weight": torch.zeros(shape)
               for end, shape in (("down", (2, 640)), ("up", (640, 2)))}, "xl.safetensors")  # fmt: skip
    message = hdb.fail("eval", "--lora", "xl.safetensors", "--reference", "people/p0/0.png", *QUICK)
    assert "xl.safetensors" in message
