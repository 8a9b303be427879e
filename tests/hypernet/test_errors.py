"""What the libraries say where memory runs out, in sentences from their sources; and which weights differ."""

import pytest
import torch

from hypernet.errors import differing_shapes, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.90 GB, other allocations: 1 KB, max allowed: 9 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=str,
)
def test_running_out_of_memory_is_recognised_on_every_device(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory is a value here"),
        OSError(28, "No space left on device"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_weights_differ_by_name_and_shape_and_not_by_value():
    ours = {"same": torch.zeros(2, 3), "wider": torch.zeros(2, 3), "ours": torch.zeros(1)}
    theirs = {"same": torch.ones(2, 3), "wider": torch.zeros(3, 2), "theirs": torch.zeros(1)}
    assert differing_shapes(theirs, ours) == ["ours", "theirs", "wider"]
    assert differing_shapes(ours, ours) == []
