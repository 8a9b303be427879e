"""Patterns of a file mean what PEFT says they mean, and none of them takes long."""

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from converters.convert import prepare_conversion
from converters.formats.kohya import save_kohya
from converters.formats.reading import read_lora
from converters.metadata import KohyaMetadata
from lidb_peft.patterns import check_patterns, find_pattern

PARTS = ("down_blocks", "0", "attn1", "to_q", "to_out", "x")
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)
PATTERNS = NAMES | st.sampled_from(
    [r"to_.*", r"attn\d\.to_(q|k)", "^down_blocks", ".*attn1.*", "(down|up)_blocks.0", "to"]
)


@settings(max_examples=300)
@given(st.lists(PATTERNS, max_size=6), NAMES)
def test_the_first_that_fits_is_the_one_that_peft_takes(patterns, name):
    found = find_pattern(dict.fromkeys(patterns), name, "a file")
    assert (name if found is None else found) == get_pattern_key(patterns, name)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(.*)*x", ".*.*.*.*.*x", "a?" * 30 + "a" * 30, "(|a)" * 40, r"(\w+\.)*x", "(?=a)", r"(a)\1",
     "(", "[", "a{1,99999}" * 9, "x" * 3000, "(" * 500 + ")" * 500],
)  # fmt: skip
def test_what_could_take_long_is_refused_before_it_is_tried(pattern):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"^theirs names layers by .*; (it is damaged|name the layers themselves)"):
        check_patterns([pattern] * 2, "theirs")
    assert time.perf_counter() - start < 5  # where Python's own matching would end in years


@pytest.mark.parametrize(
    "pattern", [r".*attn.*to_(q|k|v|out\.0)", r"(down|up)_blocks\.\d+\..*", "(?:unet|text)?.*to_q"]
)
def test_what_people_write_is_taken(pattern):
    check_patterns(pattern, "theirs")


def test_too_many_are_refused_and_many_are_quick(tmp_path):
    with pytest.raises(ValueError, match="by 100000 patterns, more than the 10000"):
        check_patterns(dict.fromkeys(map(str, range(100_000))), "theirs")
    names = [f"mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(9)]
    save_kohya(tmp_path / "a.safetensors", {f"unet.{name}": (torch.ones(1, 8), torch.ones(8, 1)) for name in names[:1]},
               KohyaMetadata())  # fmt: skip
    prepare_conversion(tmp_path / "a.safetensors", tmp_path / "peft", "peft").write()
    config = tmp_path / "peft" / "unet" / "adapter_config.json"
    entries = json.loads(config.read_text())
    for patterns in ({"(a+)+b": 4}, dict.fromkeys(map(str, range(100_000)), 4)):
        config.write_text(json.dumps(entries | {"alpha_pattern": patterns}))
        with pytest.raises(ValueError, match="its alpha_pattern names layers by"):
            read_lora(tmp_path / "peft")
    config.write_text(json.dumps(entries | {"alpha_pattern": {"to_q": 4}}))
    assert [layer.alpha for layer in read_lora(tmp_path / "peft").layers.values()] == [4.0]


@pytest.mark.parametrize("value", [True, 3, 1.5])
def test_what_is_no_list_of_names_is_refused(value):
    with pytest.raises(ValueError, match=r"its modules_to_save is .*, which names no layers; it is damaged"):
        check_patterns(value, "its modules_to_save")
