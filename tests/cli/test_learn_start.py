"""`hdb learn-start`, and what `hdb personalize` makes of it."""

from click.testing import CliRunner
from PIL import Image

from cli.main import main
from hypernet.fitting.starts import load_start
from testbed.protocol import photo

QUICK = ["--base", "testbed", "--hypernet", "none", "--adapt", "denoiser", "--rank", "2", "--no-crop"]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def draw_faces(folder, count):
    folder.mkdir()
    for person in range(count):
        Image.fromarray(photo(person, 0)).save(folder / f"{person}.png")


def test_a_start_is_learned_found_beside_its_base_and_used(tmp_path):
    draw_faces(tmp_path / "faces", 3)
    out = tmp_path / "start.safetensors"
    learned = run("learn-start", tmp_path / "faces", *QUICK, "--rounds", 2, "--people", 2, "--inner-steps", 1,
                  "--out", out)  # fmt: skip
    assert learned.exit_code == 0, learned.output
    assert f"wrote {out}" in learned.output
    start = load_start(out)
    assert (start.rank, len(start.factors)) == (2, 128)
    assert [file.name for file in tmp_path.iterdir() if file.name != "faces"] == ["start.safetensors"]

    options = [*QUICK, "--no-preview", "--steps", 1, "--out", tmp_path / "me.safetensors"]
    used = run("personalize", tmp_path / "faces" / "0.png", *options, "--start", out)
    assert used.exit_code == 0, used.output
    assert f"the finetuning started from {out}" in used.output
    refused = run("personalize", tmp_path / "faces" / "0.png", *options, "--start", out, "--rank", 4)
    assert refused.exit_code == 1
    assert "is a start of rank 2" in refused.output
    assert "--rank 2" in refused.output
    fresh = run("personalize", tmp_path / "faces" / "0.png", *options, "--start", "none")
    assert "the finetuning started from" not in fresh.output


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    draw_faces(tmp_path / "faces", 2)
    arguments = ["learn-start", tmp_path / "faces", *QUICK, "--people", 1, "--inner-steps", 1]
    whole = run(*arguments, "--rounds", 2, "--out", tmp_path / "whole.safetensors")
    assert whole.exit_code == 0, whole.output

    import hypernet.training.start as module

    real, calls = module.fit_flat_lora, []

    def dies_in_the_second_round(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "fit_flat_lora", dies_in_the_second_round)
    assert run(*arguments, "--rounds", 2, "--out", tmp_path / "part.safetensors").exit_code != 0
    monkeypatch.setattr(module, "fit_flat_lora", lambda *a, **o: (calls.append(1), real(*a, **o))[1])
    assert run(*arguments, "--rounds", 2, "--out", tmp_path / "part.safetensors").exit_code == 0
    assert len(calls) == 3  # the first round was not done again
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
