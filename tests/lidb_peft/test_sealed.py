"""What only we read again comes back as it was, or not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lidb_peft.sealed import read_sealed, read_tree, same_kind, write_sealed, write_tree

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 2), max_size=2),
    st.sampled_from([torch.float32, torch.float16, torch.uint8, torch.int64, torch.bool]),
)
KEYS = st.text(st.characters(codec="utf-8"), max_size=3) | st.integers()
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        PLAIN | TENSORS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=9,
    ),
    max_size=3,
)


def as_text(tree):
    """All of a tree, tensors with dtype, shape and values."""
    if isinstance(tree, torch.Tensor):
        return f"{tree.dtype}{tuple(tree.shape)}{tree.tolist()}"
    if isinstance(tree, dict):
        return str([(key, as_text(value)) for key, value in tree.items()])
    return str([as_text(value) for value in tree]) if isinstance(tree, list) else repr(tree)


@settings(max_examples=40)
@given(TREES)
def test_a_tree_comes_back_as_it_was(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    write_tree(path, tree)
    found = read_tree(path)
    assert as_text(found) == as_text(tree)
    assert same_kind(tree, found)


def test_an_optimizers_state_comes_back_and_goes_on_alike(tmp_path):
    def make():
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def step(weight, optimizer):
        weight.grad = torch.arange(3.0)
        optimizer.step()

    weight, optimizer = make()
    step(weight, optimizer)
    write_tree(tmp_path / "state", {"optimizer": optimizer.state_dict()})
    other, resumed = make()
    other.data.copy_(weight.data)
    resumed.load_state_dict(read_tree(tmp_path / "state")["optimizer"])
    step(weight, optimizer)
    step(other, resumed)
    assert torch.equal(weight, other)


def test_code_is_never_written():
    with pytest.raises(TypeError, match="a function cannot be written"):
        write_tree("nowhere", {"a": [as_text]})


def test_every_flipped_bit_that_says_something_is_noticed(tmp_path):
    path = tmp_path / "sealed"
    write_sealed(path, {"a": torch.arange(4), "b": torch.ones(2)}, {"who": "ann"})
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="sealed"):
            read_sealed(path)
    path.write_bytes(whole)
    assert read_sealed(path)[1] == {"who": "ann"}


@pytest.mark.parametrize(
    "tree", ["[1]", "{}", '{"tensor": "9"}', '{"dict": [1]}', '{"code": "x"}', "[" * 100_000, '{"dict": 3}']
)
def test_a_whole_file_of_something_else_is_no_tree(tmp_path, tree):
    write_sealed(tmp_path / "a", {"0": torch.ones(1)}, {"tree": tree})
    with pytest.raises(ValueError, match="a is damaged: what it holds is no tree"):
        read_tree(tmp_path / "a")
