"""Whether an output may be written: never over an input, into one, or over what is there without being told so."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lidb_peft.files import atomic_path
from lidb_peft.outputs import FOLDER, check_distinct, check_name, check_output, check_output_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with a LoRA ``me.safetensors`` and a folder ``model`` that holds ``unet/a.safetensors``."""
    monkeypatch.chdir(tmp_path)
    Path("me.safetensors").write_text("mine")
    Path("model/unet").mkdir(parents=True)
    Path("model/unet/a.safetensors").write_text("mine")
    return tmp_path


def other_names(path: str) -> dict[str, Path]:
    """Other names of a file that is there, by what makes them the same."""
    path = Path(path)
    names = {"dot": Path(".", "x", "..", path), "absolute": path.absolute(), "case": path.with_name(path.name.upper())}
    Path("x").mkdir(exist_ok=True)
    for kind, link in (("hard link", os.link), ("symbolic link", os.symlink)):
        names[kind] = Path(kind.replace(" ", "-") + path.suffix)
        link(path.absolute() if link is os.symlink else path, names[kind])
    os.symlink(path.absolute().parent, "way", target_is_directory=True)
    return names | {"linked folder": Path("way", path.name)}


def test_an_input_is_never_an_output_by_whatever_name(here):
    for name in other_names("me.safetensors").values():
        for target, source in ((name, "me.safetensors"), ("me.safetensors", name)):
            with pytest.raises(ValueError, match="both what is read and what is written"):
                check_output(target, [None, "no/such-id", source], overwrite=True)
    check_output("other.safetensors", ["me.safetensors"])


def test_a_link_that_leads_to_an_input_does_not_make_it_an_output(here):
    os.symlink(here / "me.safetensors", "link.safetensors")
    with pytest.raises(ValueError, match="both what is read"):
        check_output("link.safetensors", ["me.safetensors"], overwrite=True)
    os.symlink(here / "gone", "dangling.safetensors")
    with pytest.raises(FileExistsError, match=r"dangling\.safetensors exists"):
        check_output("dangling.safetensors")


def test_nothing_is_written_inside_an_input_nor_around_one(here):
    os.symlink(here / "model/unet", "way", target_is_directory=True)
    for target in ("model/b.safetensors", "model/unet/b.safetensors", "way/b.safetensors"):
        with pytest.raises(ValueError, match="lies inside model, which is read"):
            check_output(target, ["model"])
    with pytest.raises(ValueError, match="lies inside model"):
        check_output("model/merged", ["model"], FOLDER)
    with pytest.raises(ValueError, match="lies inside model"):
        check_output_folder("model/merged", ["model"])
    os.symlink("model", "link", target_is_directory=True)
    for target in ("model", "link"):
        with pytest.raises(ValueError, match=f"which is read, lies inside {target}"):
            check_output_folder(target, ["model/unet"])
        check_output_folder(target, ["model/unet"], may_hold_inputs=True)
    with pytest.raises(ValueError, match="both what is read"):
        check_output_folder("link", ["model"], may_hold_inputs=True)
    check_output("model2/m", ["model"], FOLDER, parents=True)  # which only begins with the name of the input
    check_output("model/unet/b.safetensors", ["model/unet/a.safetensors"])  # beside an input that is a file


def test_what_exists_is_kept_unless_told_otherwise(here):
    with pytest.raises(FileExistsError, match=r"me\.safetensors exists and is kept; .* --overwrite"):
        check_output("me.safetensors")
    check_output("me.safetensors", overwrite=True)
    Path("me.safetensors").chmod(0o444)
    with pytest.raises(FileExistsError, match="exists and is kept"):
        check_output("me.safetensors")
    with pytest.raises(PermissionError, match="is read-only and is kept"):
        check_output("me.safetensors", overwrite=True)
    Path("folder.safetensors").mkdir()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="name a new folder, or remove it first"):
            check_output("model", suffix=FOLDER, overwrite=overwrite)
        with pytest.raises(IsADirectoryError):
            check_output("folder.safetensors", overwrite=overwrite)


def test_a_folder_that_a_run_writes_into_holds_an_earlier_run_or_nothing_of_its_names(here):
    check_output_folder("new/run", files=("last",))
    check_output_folder("model", files=("last", "log.jsonl", "samples/step-*.png"))
    Path("model/samples").mkdir()
    Path("model/samples/step-1.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model/samples/step-1\.png exists and was not made by an earlier run"):
        check_output_folder("model", files=("last", "samples/step-*.png"))
    check_output_folder("model", files=("last", "samples/step-*.png"), is_resumed=True)
    Path("notes").write_text("mine")
    for target in ("notes", "notes/run"):
        with pytest.raises(NotADirectoryError, match="notes is a file"):
            check_output_folder(target)


@pytest.mark.parametrize(
    ("target", "suffix", "text"),
    [
        ("a.ckpt", ".safetensors", "does not end in .safetensors"),
        ("a.pt", ".safetensors", "does not end in .safetensors"),
        (".safetensors", ".safetensors", "does not end in .safetensors"),
        ("a.jpg", ".png", "pictures are written as PNG"),
        ("a.safetensors", FOLDER, "is named as a file and would be a folder"),
    ],
)
def test_a_suffix_fits_what_is_written(here, target, suffix, text):
    with pytest.raises(ValueError, match=text):
        check_output(target, suffix=suffix)
    check_output("a.SafeTensors")
    check_output("v1.5", suffix=FOLDER)


@pytest.mark.parametrize(
    "name",
    ["a:b<c>.safetensors", "me?.safetensors", "a|b", "tab\t.safetensors", "me..safetensors", "me .safetensors",
     "loras.", "loras ", "CON.safetensors", "nul.v2.safetensors", "com1", "LPT9", os.fsdecode(b"m\xfc.safetensors")],
)  # fmt: skip
def test_a_name_that_windows_a1111_or_utf_8_cannot_hold_is_refused_before_the_work(here, name):
    suffix = ".safetensors" if name.endswith(".safetensors") else FOLDER
    with pytest.raises(ValueError, match="the name "):
        check_output(name, suffix=suffix)
    with pytest.raises(ValueError, match="the name "):
        check_output(Path(name.removesuffix(".safetensors"), "a.safetensors"), parents=True)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters='<>:"/\\|?*'), min_size=1))
def test_other_names_are_taken_in_any_script(text):
    text = text.strip(". ")
    if text and text.upper().partition(".")[0].rstrip() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}:
        check_name(f"{text}.safetensors")


@pytest.mark.parametrize("letter", ["a", "ü", "面"])
def test_what_is_accepted_can_be_written_and_no_longer_name_is_accepted(here, letter):
    def name(count: int) -> str:
        return letter * count + ".safetensors"

    longest = 0
    for count in range(60, 260):
        try:
            check_output(name(count))
        except ValueError as error:
            assert "bytes, and" in str(error)  # noqa: PT017
            break
        longest = count
    assert len(name(longest).encode()) > 220
    with atomic_path(name(longest)) as temporary:
        temporary.write_text("new")
    assert Path(name(longest)).read_text() == "new"


def test_a_folder_that_is_missing_a_file_or_locked_is_named(here, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; make the folder first"):
        check_output("nowhere/a.safetensors")
    check_output("nowhere/deep/a.safetensors", parents=True)
    with pytest.raises(NotADirectoryError, match=r"me\.safetensors is a file"):
        check_output("me.safetensors/a.safetensors", parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model")  # root may write anywhere
    for target in ("model/a.safetensors", "model/new/a.safetensors"):
        with pytest.raises(PermissionError, match="model is not writable"):
            check_output(target, parents=True)
    with pytest.raises(PermissionError, match="model is not writable"):
        check_output_folder("model")


def test_two_outputs_of_one_run_are_two_files(here):
    check_distinct([("the LoRA", "a.safetensors"), ("the LiDB weights", "b.safetensors")])
    for other in ("./a.safetensors", "A.safetensors", here / "a.safetensors"):
        with pytest.raises(ValueError, match="would be both the LoRA and the LiDB weights"):
            check_distinct([("the LoRA", "a.safetensors"), ("the LiDB weights", other)])
