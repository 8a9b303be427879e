"""What of a prompt is lost is said, or refused where it is the person."""

import pytest

from hypernet.prompts import check_trained_prompt, warn_of_prompts

LONG = "a very long prompt of many words " * 20


def test_a_trained_prompt_that_loses_its_token_is_refused(base):
    with pytest.raises(ValueError, match=r"longer than .* reads, and its token 'sks' is cut off; make it shorter"):
        check_trained_prompt(base, f"{LONG} a sks face", "sks")
    with pytest.warns(UserWarning, match=r"is longer than .* reads; .* is cut off"):
        check_trained_prompt(base, f"a sks face {LONG}", "sks")
    check_trained_prompt(base, "a sks face", "sks")


@pytest.mark.parametrize(
    "syntax",
    ["(sks:1.3)", "<lora:ann:0.8>", "[sks: 0.5]", "(sks:-.5)", "((sks))", "[cat:dog:10]", "[cat|dog]", "BREAK", "AND"],
)
def test_the_syntax_of_automatic1111_is_told_apart(base, syntax):
    with pytest.raises(ValueError, match="Automatic1111's own syntax"):
        check_trained_prompt(base, f"a {syntax} face", "sks")
    with pytest.warns(UserWarning, match="Automatic1111's own syntax; here it is read as words"):
        warn_of_prompts(base, [f"a {syntax} face"])


@pytest.mark.filterwarnings("error")
def test_plain_prompts_are_passed_over(base):
    warn_of_prompts(
        base,
        [
            "a sks face (smiling), at 10:30",
            "portrait [detail] of a sks face",
            "rock and roll",
            "A BREAKDOWN (1990: live)",
        ],
    )
