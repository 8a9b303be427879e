import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

import lidb_peft.files as files
from lidb_peft.files import (
    LazyTensor,
    atomic_files,
    atomic_folder,
    atomic_path,
    locked_folder,
    safetensors_chunks,
    write_safetensors,
)


def to_bytes(tensors, metadata):
    return b"".join(safetensors_chunks(tensors, metadata))


def test_bytes_are_the_same_for_any_order_of_metadata():
    tensors, pairs = {"a": torch.randn(3)}, [(f"k{i}", 'ü"\n\\\x01') for i in range(9)]
    blob = to_bytes(tensors, dict(pairs))
    assert to_bytes(tensors, dict(reversed(pairs))) == blob
    assert torch.equal(load(blob)["a"], tensors["a"])
    assert int.from_bytes(blob[:8], "little") % 8 == 0


def test_the_bytes_are_the_librarys_own(tmp_path):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {
        f"{name}.{dtype}": (9 * torch.randn(3, 2)).to(dtype) for dtype in dtypes for name in ("b", "a", "\u00e9")
    }
    tensors |= {"alpha": torch.tensor(2.0), "empty": torch.zeros(0, 3), "strided": torch.arange(6.0).view(2, 3).T}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert to_bytes(tensors, {"one": "key"}) == save(contiguous, {"one": "key"})
    assert to_bytes(tensors, {}) == save(contiguous)
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert (tmp_path / "a.safetensors").read_bytes() == save(contiguous)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def write(target, error=None):
        with atomic_folder(target) as folder:
            (folder / "a").write_text("new")
            assert not target.exists()
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    with pytest.raises(FileExistsError, match="out exists; name a new folder"):
        write(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; make the folder first"):
        write(tmp_path / "nowhere/out")


def test_a_folder_that_is_there_is_replaced_as_a_whole_on_request_only(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (tmp_path / "out/old").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out"]
    (tmp_path / "file").write_text("a file is no folder")
    with pytest.raises(FileExistsError, match="file exists"), atomic_folder(tmp_path / "file", overwrite=True):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_may_read_what_they_may_read_of_new_files(tmp_path):
    """The library that writes safetensors keeps them to their owner."""
    mask = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "a") as whole, atomic_files(tmp_path / "b") as parts:
            for folder in (whole, parts):
                save_file({"x": torch.ones(1)}, folder / "x.safetensors")
                (folder / "x.safetensors").chmod(0o600)
                (folder / "run").touch(mode=0o750)
    finally:
        os.umask(mask)
    modes = {path.relative_to(tmp_path).as_posix(): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*.*")}
    assert modes == {"a/x.safetensors": "0o640", "b/x.safetensors": "0o640"}
    assert [oct((tmp_path / name / "run").stat().st_mode & 0o777) for name in "ab"] == ["0o750"] * 2


KILLED = """
import os, sys
import lidb_peft.files as files
from lidb_peft.files import atomic_files, atomic_folder, atomic_path
folder = sys.argv[1]
with atomic_path(f"{folder}/a") as a, atomic_folder(f"{folder}/b") as b, atomic_files(f"{folder}/c") as c:
    for path in (a, b / "x", c / "y"):
        path.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def killed_writer(folder):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows tells a leftover by nobody having it open")
def test_the_next_process_removes_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / ".a.notes.tmp").write_text("mine")
    with killed_writer(tmp_path) as writer:
        assert writer.stdout.readline() == b"writing\n"
        with locked_folder(tmp_path, "the test"), locked_folder(tmp_path / "c", "the test"):
            assert len([file for file in tmp_path.rglob("*") if file.name.endswith(".hdb-tmp")]) == 3  # in use
        writer.kill()
    monkeypatch.setattr(files, "_cleaned", set())
    write_safetensors(tmp_path / "d", {}, {})
    with locked_folder(tmp_path / "c", "the test"):
        pass
    assert sorted(file.name for file in tmp_path.rglob("*")) == [".a.notes.tmp", "c", "d"]


REPLACING = """
import os, sys
from lidb_peft.files import atomic_folder
folder, die_before = sys.argv[1], int(sys.argv[2])
renames = 0
def hook(event, arguments):
    global renames
    if event in ("os.rename", "os.rmdir"):
        renames += 1
        if renames == die_before:
            os.kill(os.getpid(), 9)
with atomic_folder(f"{folder}/out", overwrite=True) as new:
    for name in "ab":
        (new / name).write_text("new")
    sys.addaudithook(hook)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9")
@pytest.mark.parametrize(("die_before", "expected"), [(1, "old"), (2, "old"), (3, "new"), (9, "new")])
def test_a_folder_whose_replacing_is_killed_is_the_old_or_the_new_one(tmp_path, monkeypatch, die_before, expected):
    (tmp_path / "out").mkdir()
    for name in "ab":
        (tmp_path / "out" / name).write_text("old")
    command = [sys.executable, "-c", REPLACING, str(tmp_path), str(die_before)]
    code = subprocess.run(
        command, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ).returncode
    assert code == (0 if die_before == 9 else -9)
    monkeypatch.setattr(files, "_cleaned", set())
    write_safetensors(tmp_path / "other", {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a": expected, "b": expected}


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".hdb-tmp"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out", overwrite=True) as new:
        (new / "new").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "out"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with (
        locked_folder(tmp_path / "new", "a training"),
        pytest.raises(BlockingIOError, match=r"a training is at work in .*new already; wait for its end"),
        locked_folder(tmp_path / "new", "a training"),
    ):
        pass
    with locked_folder(tmp_path / "new", "a training"):
        pass
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'"), ("c", "d", "[Errno 5] ...")]),
    ],
    ids=["own", "safetensors", "shutil"],
)
def test_a_full_disk_is_told_of_the_file_that_was_to_be_written_whoever_noticed_it(tmp_path, error):
    for context in (atomic_path, atomic_folder):
        with pytest.raises(OSError, match=r"No space left on device: '.*target'") as told, context(tmp_path / "target"):
            raise error
        assert told.value.errno == 28
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_path(tmp_path / "target"):
        (tmp_path / "elsewhere").read_text()
    assert not list(tmp_path.iterdir())


def test_lazy_tensors_are_loaded_one_after_the_other_and_write_the_same_file(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(4.0).half(), "c": torch.randn(1, 2, 2)}
    order = []

    def lazy(name):
        tensor = tensors[name]
        return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: order.append(name) or tensor)

    write_safetensors(tmp_path / "eager.safetensors", tensors, {"x": "y"})
    write_safetensors(tmp_path / "lazy.safetensors", {name: lazy(name) for name in tensors}, {"x": "y"})
    assert (tmp_path / "lazy.safetensors").read_bytes() == (tmp_path / "eager.safetensors").read_bytes()
    assert order == ["b", "c", "a"]  # float32 first, then by name
    assert lazy("c").reshape(-1, 2).shape == (2, 2)
    assert torch.equal(lazy("c").reshape(-1, 2).load(), tensors["c"].reshape(2, 2))


def test_a_lazy_tensor_that_cannot_be_computed_leaves_no_file(tmp_path):
    def fail():
        raise ValueError("no numbers")

    tensors = {"a": torch.zeros(2), "b": LazyTensor(torch.float32, (2,), fail)}
    with pytest.raises(ValueError, match="no numbers"):
        write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert not list(tmp_path.iterdir())


def test_hashes_are_of_the_bytes_behind_the_header_and_written_into_it(tmp_path):
    class Sha:
        def __init__(self):
            self.sha = hashlib.sha256()

        def update(self, chunk):
            self.sha.update(chunk)

        def entries(self):
            return {"hash": self.sha.hexdigest()}

    write_safetensors(tmp_path / "a.safetensors", {"a": torch.randn(5), "b": torch.randn(2)}, {"x": "y"}, Sha())
    blob = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    assert json.loads(blob[8:start])["__metadata__"] == {"hash": hashlib.sha256(blob[start:]).hexdigest(), "x": "y"}
