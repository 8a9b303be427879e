from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from converters import write_lora
from hypernet.personalized import lora_metadata
from hypernet.sampling import generate, lora_applied
from hypernet.sheets import DrawConfig, contact_sheet, generate_to_file
from lidb_peft import save_theta

QUICK = DrawConfig(num_steps=1)


def pixels(picture):
    return np.asarray(picture, dtype=np.float64)


def test_one_picture_for_each_prompt_from_one_noise(base):
    pictures = generate(base, ["a face", "a face", "a pencil drawing"], num_steps=2, seed=4)
    assert [picture.size for picture in pictures] == [(32, 32)] * 3
    assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).max() <= 1
    again = generate(base, ["a face"], num_steps=2, seed=4)[0]
    assert np.abs(pixels(pictures[0]) - pixels(again)).max() <= 1
    other = generate(base, ["a face"], num_steps=2, seed=5)[0]
    assert np.abs(pixels(other) - pixels(again)).max() > 1


def test_factors_change_the_picture_and_leave_the_base_alone(base, space, factors):
    plain = generate(base, ["a face"], num_steps=2)[0]
    assert pixels(generate(base, ["a face"], space, factors, num_steps=2)[0]).tolist() != pixels(plain).tolist()
    assert generate(base, ["a face"], num_steps=2)[0].tobytes() == plain.tobytes()


def test_a_lora_file_draws_as_its_factors_do(base, space, factors, lora):
    expected = generate(base, ["a face"], space, factors, num_steps=2)[0]
    plain = generate(base, ["a face"], num_steps=2)[0]
    with lora_applied(base, lora):
        found = generate(base, ["a face"], num_steps=2)[0]
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1
    assert generate(base, ["a face"], num_steps=2)[0].tobytes() == plain.tobytes()
    with lora_applied(base, lora, weight=0.0):
        nothing = generate(base, ["a face"], num_steps=2)[0]
    assert np.abs(pixels(nothing) - pixels(plain)).max() <= 1
    assert not any("lora" in name for name in base.unet.state_dict())


@pytest.mark.parametrize("scheduler", [None, PNDMScheduler])
def test_progress_ends_at_its_total(base, scheduler):
    """SD1.5's own scheduler takes one step more than it is asked for."""
    if scheduler is not None:
        base = replace(base, scheduler=scheduler.from_config(base.scheduler.config, skip_prk_steps=True))
    seen = []
    generate(base, ["a face"], num_steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step + 1, len(seen)) for step in range(len(seen))]


def test_one_prompt_is_a_picture_and_several_are_a_sheet(base, lora, tmp_path):
    generate_to_file(base, ["a face"], tmp_path / "one.png", config=QUICK)
    assert Image.open(tmp_path / "one.png").size == (32, 32)
    generate_to_file(base, ["a face", "a pencil drawing"], tmp_path / "two.png", [lora], config=QUICK)
    assert Image.open(tmp_path / "two.png").size[0] > 2 * 192


def test_a_sheet_holds_every_picture():
    colours = ["red", "green", "blue", "white"]
    rows = [("a", [Image.new("RGB", (8, 8), c) for c in colours[:2]]), ("b\nc", [Image.new("RGB", (500, 300), "blue")])]
    sheet = contact_sheet(rows, ["one", "a long label that takes more than the one line which a cell is wide"])
    found = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= found


def spoil(lora, name, change):
    tensors = change(load_file(lora))
    save_file({key: value.contiguous() for key, value in tensors.items()}, lora.with_name(name), metadata={"a": "b"})
    return lora.with_name(name)


def with_nan(tensors):
    first = next(name for name in sorted(tensors) if name.endswith("lora_up.weight"))
    return tensors | {first: tensors[first] * float("nan")}


def widened(tensors):
    return {name: value.repeat(1, 5) if name.endswith("down.weight") else value for name, value in tensors.items()}


def loha(tensors):
    return {name.replace("lora_down.weight", "hada_w1_a").replace("lora_up.weight", "hada_w1_b"): value
            for name, value in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_nan, "bad.safetensors holds NaN or infinity in 1 tensors, e.g. lora_"),
        (widened, "bad.safetensors does not fit .*other names or widths"),
        (loha, "bad.safetensors is a kohya LoHa; only a LoRA"),
        (lambda tensors: {name: tensors[name] for name in sorted(tensors)[:0]}, "name a LoRA or theta file"),
        (lambda tensors: {"lora_unet_nowhere_to_q.lora_down.weight": torch.ones(2, 64),
                          "lora_unet_nowhere_to_q.lora_up.weight": torch.ones(64, 2)}, "does not fit"),
    ],
)  # fmt: skip
def test_a_bad_lora_is_refused_and_the_base_stays_clean(base, lora, tmp_path, change, text, capfd):
    bad = spoil(lora, "bad.safetensors", change)
    with pytest.raises(ValueError, match=text) as caught:
        generate_to_file(base, ["a face"], tmp_path / "out.png", [bad], config=QUICK)
    assert "\n" not in str(caught.value)
    assert "size mismatch" not in capfd.readouterr().err
    assert not (tmp_path / "out.png").exists()
    assert not any("lora" in name for name in base.unet.state_dict())
    with lora_applied(base, lora):  # and a good one loads after it
        pass


def test_a_lora_of_another_family_is_refused(base, space, factors, tmp_path):
    file = tmp_path / "sd2.safetensors"
    write_lora(file, factors, replace(lora_metadata(base, "a sks face"), family="sd2"))
    with pytest.raises(ValueError, match=r"sd2.safetensors is made for SD2 and .* is SD1"), lora_applied(base, file):
        pass


def test_a_theta_file_is_no_lora(base, space, tmp_path):
    save_theta(tmp_path / "theta.safetensors", space.theta_0, space)
    with (
        pytest.raises(ValueError, match="holds LiDB weights, not a LoRA; make one of them with hdb convert"),
        lora_applied(base, tmp_path / "theta.safetensors"),
    ):
        pass


def test_pictures_are_named_png(base, tmp_path):
    with pytest.raises(ValueError, match=r"out.jpg does not end in .png"):
        generate_to_file(base, ["a face"], tmp_path / "out.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        generate_to_file(base, ["a face"], tmp_path / "nowhere/out.png")
