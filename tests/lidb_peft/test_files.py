import torch
from safetensors.torch import load

from lidb_peft.files import to_bytes


def test_bytes_are_the_same_for_any_order_of_metadata():
    tensors, pairs = {"a": torch.randn(3)}, [(f"k{i}", 'ü"\n\\\x01') for i in range(9)]
    blob = to_bytes(tensors, dict(pairs))
    assert to_bytes(tensors, dict(reversed(pairs))) == blob
    assert torch.equal(load(blob)["a"], tensors["a"])
    assert int.from_bytes(blob[:8], "little") % 8 == 0
