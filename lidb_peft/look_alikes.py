"""What people have under the name of a safetensors file that is none: pointers, web pages, archives, pictures.

Only the beginning is looked at, and only of files that could not be read; nothing is opened or run.
"""

import re

_DOWNLOAD = "download the file itself"
# What a file begins with -> what it is, and what to do. Text is lower case, without a byte order mark and blanks.
_TEXTS = (
    ("version https://git-lfs", "a Git LFS pointer, which stands for the file", "run `git lfs pull` in its repository"),
    ("# xet version", "a Xet pointer, which stands for the file", "get it with `hf download`"),
    ("/annex/objects/", "a git-annex pointer, which stands for the file", "run `git annex get` in its repository"),
    ("[internetshortcut]", "a link to a web page", _DOWNLOAD),
    ("<!doctype html", "a web page", "the download needs a login or another link: open the link in a browser"),
    ("<html", "a web page", "the download needs a login or another link: open the link in a browser"),
    ("<?xml", "an XML page, such as servers send with an error", "the link may have expired: get a new one"),
    ("<error", "an XML page, such as servers send with an error", "the link may have expired: get a new one"),
    ("<svg", "a picture (SVG)", _DOWNLOAD),
    ("{", "JSON text", "name the .safetensors file that it belongs to, or download it again if this is an error page"),
    ("[", "JSON text", "name the .safetensors file that it belongs to, or download it again if this is an error page"),
)
_BYTES = (
    (b"\x89PNG", "a picture (PNG)", _DOWNLOAD),
    (b"\xff\xd8\xff", "a picture (JPEG)", _DOWNLOAD),
    (b"GIF8", "a picture (GIF)", _DOWNLOAD),
    (b"RIFF", "a picture (WebP) or a sound", _DOWNLOAD),
    (b"%PDF", "a PDF document", _DOWNLOAD),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and name the .safetensors file inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and name the .safetensors file inside"),
    (b"Rar!", "a RAR archive", "unpack it, and name the .safetensors file inside"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it, and name the .safetensors file inside"),
    (b"BZh", "a bzip2 archive", "unpack it, and name the .safetensors file inside"),
    (b"\xfd7zXZ", "an xz archive", "unpack it, and name the .safetensors file inside"),
    (b"GGUF", "a GGUF file, whose weights are quantised", "name a .safetensors file of it"),
    (b"\x93NUMPY", "a NumPy array", "name a .safetensors file"),
    (b"\x89HDF", "an HDF5 file", "name a .safetensors file"),
    (b"\x00\x05\x16\x07", "what macOS keeps beside a file (its name begins with ._)", "name the file itself"),
    (b"d8:announce", "a torrent", "open it in a torrent program"),
)
_START_BYTES = 2048
_MAX_QUOTED = 80


def name_look_alike(start: bytes, size: int) -> str:
    """Return what a file is that begins with ``start`` and has ``size`` bytes, and what to do; "" if it is not known.

    It goes on a sentence that begins with the file's path: "is a web page ...; download the file itself".
    """
    if not size:
        return "is empty: nothing was downloaded or copied; get it again"
    start = start[:_START_BYTES]
    if not any(start) and len(start) > 8:
        return "begins with zeros only: its download was not finished; get it again"
    for begin, what, remedy in _BYTES:
        if start.startswith(begin):
            return f"is {what}, not a safetensors file; {remedy}"
    # A zip archive with pickles in it is what torch saves.
    if start.startswith(b"PK\x03\x04") and b".pkl" not in start:
        return "is a zip archive, not a safetensors file; unpack it, and name the .safetensors file inside"
    text = _as_text(start)
    if text is None:
        return ""
    for opening, what, remedy in _TEXTS:
        if text.lower().startswith(opening):
            return f"is {what}, not a safetensors file{_quoted(text) if opening in '{[' else ''}; {remedy}"
    return f"is a text, not a safetensors file{_quoted(text)}; download the file itself again"


def _as_text(start: bytes) -> str | None:
    """The text that a file begins with; None if it is none."""
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = start.decode(encoding, errors="ignore").strip()
    is_whole = encoding == "utf-16" or len(text.encode()) > len(start.strip()) - 8
    is_text = bool(text) and is_whole and all(char.isprintable() or char in "\n\r\t" for char in text)
    return text if is_text else None


def _quoted(text: str) -> str:
    line = re.sub(r"\s+", " ", text)
    return f" ({line[:_MAX_QUOTED]}{'...' if len(line) > _MAX_QUOTED else ''})"
