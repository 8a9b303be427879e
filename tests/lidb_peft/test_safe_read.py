import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from lidb_peft.safe_read import read_header, read_json_object, read_tensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def as_file(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_good_file_is_read_as_safetensors_reads_it(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(2.0, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"k": "v"})
    read, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"}
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read_header(tmp_path / "a.safetensors").tensors["a"].shape == (3, 2)


BAD = {
    "empty": (b"", "is empty"),
    "short": (b"\x05\0\0", "too few"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "is truncated: it announces a header"),
    "no json": (as_file(b"{nonsense"), "not valid JSON"),
    "no utf-8": (as_file(b"\xff\xfe{}"), "not valid JSON"),
    "deep json": (as_file(b"[" * 200_000), "not valid JSON"),
    "huge number": (as_file(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "a list": (as_file(b"[1]"), "not a JSON object"),
    "name twice": (as_file(b'{"a": {}, "a": {}}'), "used twice"),
    "metadata numbers": (as_file({"__metadata__": {"k": 1}, "a": entry()}), "text to text"),
    "entry no object": (as_file({"a": 3}), "entry of tensor 'a'"),
    "unknown dtype": (as_file({"a": entry(dtype="F99")}), "dtype 'F99'"),
    "dtype no text": (as_file({"a": entry(dtype=["F32"])}), "dtype"),
    "negative shape": (as_file({"a": entry(shape=(-2,))}), "has shape"),
    "true as shape": (as_file({"a": entry(shape=(True,))}), "has shape"),
    "three offsets": (as_file({"a": entry(offsets=(0, 4, 8))}), "offsets"),
    "size and shape differ": (as_file({"a": entry(shape=(3,))}), "needs 12 bytes and claims 8"),
    "absurd shape": (as_file({"a": entry(shape=(10**18, 10**18))}), "needs 4000"),
    "a thousand dimensions": (as_file({"a": entry(shape=(2,) * 1000)}), "has shape"),
    "more than torch counts": (as_file({"a": entry(shape=(0, 2**63), offsets=(0, 0))}), "has shape"),
    "end before start": (as_file({"a": entry(offsets=(8, 0))}), "claims -8"),
    "overlap": (as_file({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "'b' overlaps"),
    "hole": (as_file({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "'b' leaves a hole"),
    "truncated data": (as_file({"a": entry()}, b"\0" * 7), "is truncated: its tensors take 8 bytes and 7"),
    "bytes left over": (as_file({"a": entry()}, b"\0" * 9), "belong to no tensor"),
    "pickle inside": (b"\x80\x02}q\0.", "is a pickled file"),
    "zip inside": (b"PK\x03\x04" + b"\0" * 26 + b"archive/data.pkl" + b"\0" * 30, "is a pickled file"),
}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 151108831\n"
LOOK_ALIKES = {
    "git lfs": (LFS, r"a Git LFS pointer.*run `git lfs pull`"),
    "git-annex": (b"/annex/objects/MD5E-s1--d41d8cd9.safetensors\n", "git annex get"),
    "html": (b"<!DOCTYPE html><html>", "a web page.*open the link in a browser"),
    "html after blanks": (b"\n\n  <HTML lang='en'>\n<head>", "a web page"),
    "html with a byte order mark": (b"\xef\xbb\xbf<!doctype HTML>", "a web page"),
    "html in utf-16": ("\ufeff<!DOCTYPE html><html></html>".encode("utf-16-le"), "a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML page.*get a new one"),
    "json": (
        b'{"error":"Unauthorized","message":"log in"}',
        r'JSON text.*\(\{"error":"Unauthorized".*download it again',
    ),
    "a text": (b"Entry not found", r"is a text, not a safetensors file \(Entry not found\)"),
    "a text in another alphabet": ("Доступ запрещён, войдите".encode(), "is a text.*Доступ"),
    "an escape sequence": (b"\x1b]0;owned\x07<html>", "announces a header"),
    "a long line": (b"Forbidden " * 500, r"is a text.*\.\.\.\)"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a picture"),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + b"\1" * 40, "a picture"),
    "zip": (b"PK\x03\x04" + b"\0" * 26 + b"lora.safetensors", "a zip archive.*unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + b"\1" * 40, "a 7z archive"),
    # Its first eight bytes are a length of half a megabyte, which this file has.
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0" + b"\1" * 600_000, "a gzip archive"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\1" * 40, "a GGUF file"),
    "zeros": (b"\0" * 5000, "begins with zeros only: its download was not finished"),
    "macos": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + b"\0" * 40, r"macOS.*begins with \._"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_what_is_something_else_under_the_name_is_named_with_what_to_do(tmp_path, case, suffix):
    blob, message = LOOK_ALIKES[case]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(blob)
    if suffix == ".bin" and case in ("zip", "gzip", "an escape sequence"):
        message = "is a pickled file"  # torch's are zip archives
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    sentence = str(caught.value)
    assert sentence.count(str(path)) == 1
    assert sentence.isprintable()
    assert len(sentence) < len(str(path)) + 300


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_or_lying_file_is_one_clear_sentence(tmp_path, case):
    blob, message = BAD[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 400


def test_a_truncated_download_is_refused_at_every_length(tmp_path):
    save_file({"a": torch.randn(3, 2), "b": torch.randn(4)}, tmp_path / "a.safetensors", {"k": "v"})
    blob = (tmp_path / "a.safetensors").read_bytes()
    for length in range(len(blob)):
        (tmp_path / "a.safetensors").write_bytes(blob[:length])
        with pytest.raises(ValueError, match=r"truncated|too few"):
            read_header(tmp_path / "a.safetensors")


def test_a_header_of_100_megabytes_is_refused_unread(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000))
    os.truncate(path, 100_000_016)  # a sparse file: nothing is there to parse
    with pytest.raises(ValueError, match="header of 100000000 bytes, more than the 16000000 that are read"):
        read_header(path)


def test_a_huge_json_file_is_refused_unread(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.touch()
    os.truncate(path, 11_000_000)
    with pytest.raises(ValueError, match="11000000 bytes, more than the 10000000 that are read; save it again"):
        read_json_object(path, "save it again")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".PTH"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"pickled .* ask its author for a \.safetensors"):
        read_tensors(path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickles_first_bytes_is_read(tmp_path, length):
    text = json.dumps({"a": entry()}).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + text + b"\0" * 8)
    assert read_header(tmp_path / "a.safetensors").data_offset == 8 + length


def test_a_folder_and_a_missing_file_say_so(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
