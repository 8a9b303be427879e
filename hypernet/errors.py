"""What other libraries' errors say, short enough to be part of a sentence of ours; and which names differ."""

from collections.abc import Mapping

from torch import Tensor

from lidb_peft.safe_read import printable

_MAX_CHARS = 1000


def first_line(error: BaseException) -> str:
    """The error's kind if it says nothing; what it quotes of a file is made printable."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], _MAX_CHARS)


def first_sentence(error: BaseException) -> str:
    """Its first line without advice and links."""
    return first_line(error).split(". ")[0].rstrip(".")


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's, MPS's, and "CUDA error: out of memory"
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "cudnn_status_not_supported.",  # which cuDNN says where no kernel's workspace fits
    "can't allocate memory",  # of a processor
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library ran out of memory, on whatever device: by the error's type or, for it may be a plain
    RuntimeError, by what it says."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def differing_names(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    """Names, sorted, that one of two mappings lacks or that have another value there."""
    return sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))


def differing_shapes(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    """Names, sorted, of the tensors that one of two state dicts lacks or that have another shape there."""
    return differing_names(*({name: value.shape for name, value in tensors.items()} for tensors in (theirs, ours)))
