"""Sheets: which picture is where, what it says it was drawn with, and settings as A1111 means them."""

import numpy as np
import pytest
import torch
from PIL import Image

from converters import describe
from hypernet import draw_sheet, generate
from hypernet.base_models.config import BaseConfig
from hypernet.infotext import read_picture
from hypernet.sheets import DrawConfig, check_pictures

QUICK = DrawConfig(num_steps=2)


def pixels(picture):
    return np.asarray(picture, dtype=np.float64)


def is_near(ours, theirs):
    return np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_every_lora_weight_prompt_and_seed_is_drawn_in_its_place(base, space, factors, lora):
    prompts, weights, seeds = ("a face", "a drawing"), (0.5, 1.0), (3, 4)
    loras = {"file": lora, "numbers": factors, "base": None}
    sheet = draw_sheet(base, prompts, loras, weights, seeds, QUICK, space)
    assert len(sheet.pictures) == 3 * 2 * 2 * 2
    for row, column, prompt, seed in np.ndindex(3, 2, 2, 2):
        drawn = sheet.picture(row, column, prompt, seed)
        assert (drawn.lora, drawn.weight, drawn.prompt, drawn.seed) == (
            list(loras)[row], weights[column], prompts[prompt], seeds[seed],
        )  # fmt: skip
        assert is_near(sheet.picture(0, column, prompt, seed).image, sheet.picture(1, column, prompt, seed).image)
    (alone,) = generate(base, "a drawing", space, factors, 4, num_steps=2, weight=0.5)
    assert is_near(sheet.picture(1, 0, 1, 1).image, alone)
    (plain,) = generate(base, "a face", seed=3, num_steps=2)
    assert is_near(sheet.picture(2, 1, 0, 0).image, plain)
    assert not is_near(sheet.picture(1, 0, 0, 0).image, sheet.picture(1, 1, 0, 0).image)


def test_a_sheet_and_its_pictures_say_what_they_were_drawn_with(base, lora, tmp_path):
    config = DrawConfig(num_steps=2, guidance=4, negative="blurry, dark", sampler="DPM++ 2M Karras", size=(32, 40))
    sheet = draw_sheet(base, ["a face", "a drawing"], [lora], (0.5, 1), (7,), config)
    files = sheet.save(tmp_path / "sheet.png", tmp_path / "all")
    assert [file.name for file in files] == ["sheet.png", *(f"0000{number}-7.png" for number in range(4))]
    told = read_picture(files[2])
    assert (told.prompt, told.negative) == ("a drawing <lora:me:0.5>", "blurry, dark")
    assert told.fields == {
        "Steps": "2", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "4", "Seed": "7", "Size": "32x40",
        "Model": "miniature", "RNG": "CPU", "Lora hashes": f"me: {describe(lora).hashes['a1111']}",
    }  # fmt: skip
    assert Image.open(files[2]).size == (32, 40)
    whole = read_picture(files[0])
    assert whole.prompt == "a face <lora:me:0.5>"
    assert (whole.fields["X Type"], whole.fields["X Values"]) == ("Weight", "0.5, 1")
    assert (whole.fields["Y Type"], whole.fields["Y Values"]) == ("Prompt", "a face, a drawing")


def test_a_picture_is_drawn_again_from_what_it_says(base, tmp_path):
    config = DrawConfig(num_steps=3, sampler="Euler a", negative="a drawing", clip_skip=2)
    draw_sheet(base, "a face", seeds=(11,), config=config).save(tmp_path / "a.png")
    told = read_picture(tmp_path / "a.png")
    again = DrawConfig(
        num_steps=int(told.fields["Steps"]), guidance=float(told.fields["CFG scale"]), negative=told.negative,
        sampler=told.fields["Sampler"], clip_skip=int(told.fields["Clip skip"]),
        size=tuple(map(int, told.fields["Size"].split("x"))),
    )  # fmt: skip
    sheet = draw_sheet(base, told.prompt, seeds=(int(told.fields["Seed"]),), config=again)
    assert sheet.image.tobytes() == Image.open(tmp_path / "a.png").tobytes()


def test_the_grid_shows_every_picture_once_for_each_prompt(base, lora, factors):
    def grid(prompts, weights):
        return draw_sheet(base, prompts, {"a": lora, "b": factors}, weights, (0,), DrawConfig(num_steps=1)).image.size

    cell = 192 + 8
    assert grid(["x"], (1.0,))[0] < 150 + 2 * cell
    one, two = grid(["x"], (0.5, 1.0)), grid(["x", "y"], (0.5, 1.0))
    assert 150 + 2 * cell < one[0] < 150 + 3 * cell
    assert 2 * cell < one[1] < 3 * cell
    assert two == (one[0], 2 * one[1])  # a grid for each prompt, below each other


def test_clip_skip_counts_as_a1111_does(base, monkeypatch):
    """2 is the last layer but one, with CLIP's final norm; the last layer's weights then do not matter."""

    def draw(clip_skip):
        return generate(base, "a face", num_steps=1, clip_skip=clip_skip)[0].tobytes()

    whole, skipped = draw(1), draw(2)
    assert whole != skipped
    prompts = base.prepare_prompts(["a face"])
    assert torch.equal(base._skipping(["a face"], 1), base.encode_prompts(prompts).prompt_embeds)
    last = (
        base.text_encoder.text_model.encoder.layers[-1]
        if hasattr(base.text_encoder, "text_model")
        else (base.text_encoder.encoder.layers[-1])
    )
    kept = {name: value.clone() for name, value in last.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(1.5)
        assert draw(2) == skipped
        assert draw(1) != whole
    finally:
        last.load_state_dict(kept)
    layers = base.text_encoder.config.num_hidden_layers
    with pytest.raises(ValueError, match=f"has {layers} layers"):
        draw(layers + 1)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(base):
    plain = generate(base, "a face", num_steps=2)[0]
    assert not is_near(generate(base, "a face", num_steps=2, negative="a face at night")[0], plain)
    same = generate(base, "a face", num_steps=2, negative="a face", guidance=9)[
        0
    ]  # guided away from itself: not at all
    assert is_near(same, generate(base, "a face", num_steps=2, negative="a face", guidance=1.5)[0])


@pytest.mark.parametrize("name", ["sdxl", "flux_folder"])
def test_what_a_base_cannot_do_is_refused(name, request):
    base = request.getfixturevalue(name)
    with pytest.raises(ValueError, match="clip skip is 2"):
        generate(base if name == "sdxl" else str(base), "a face", num_steps=1, clip_skip=2)
    if name == "flux_folder":
        with pytest.raises(ValueError, match="takes no negative prompt"):
            generate(str(base), "a face", num_steps=1, negative="dark")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (30, 32)}, "the size is 30x32; choose multiples of 8"),
        ({"size": (32, 0)}, "at least 8"),
        ({"sampler": "Euler b"}, "did you mean 'Euler a'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"clip_skip": 0}, "clip_skip is 0"),
    ],
)
def test_bad_settings_are_refused(base, change, message):
    with pytest.raises(ValueError, match=message):
        draw_sheet(base, "a face", config=DrawConfig(**{"num_steps": 1, **change}))


def test_nothing_to_draw_is_refused(base, tmp_path):
    for arguments in (([],), ("a face", [], ()), ("a face", [], (1,), ())):
        with pytest.raises(ValueError, match=r"there is no (prompt|weight|seed)"):
            draw_sheet(base, *arguments)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileExistsError, match="pictures exists"):
        check_pictures(tmp_path / "a.png", pictures=tmp_path / "pictures")


def test_a_picture_is_not_written_into_what_the_base_is_read_from(tmp_path):
    for base in (str(tmp_path), BaseConfig("transformer.safetensors", components=str(tmp_path))):
        for arguments in ((tmp_path / "a.png",), ("a.png", base, (), tmp_path / "pictures")):
            with pytest.raises(ValueError, match=r"lies inside .*, which is read"):
                check_pictures(*(arguments if len(arguments) > 1 else (*arguments, base)))
