import pytest
import torch
from safetensors.torch import load, save

from lidb_peft.files import atomic_folder, safetensors_chunks, write_safetensors


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
