"""A1111's ``parameters`` text, as other programs read it and as they write it."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hypernet.infotext import Infotext, read_infotext, read_picture
from hypernet.sampling import save_picture

FIELDS = {
    "Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "4294967295",
    "Size": "512x768", "Model": 'odd, "name": v1', "Clip skip": "2", "RNG": "CPU",
    "Lora hashes": "me: 0123456789ab, ink: ba9876543210",
}  # fmt: skip
# As A1111 1.10 writes it, settings of extensions included.
A1111 = """portrait of a sks face, (detailed:1.2), <lora:me:0.8>
masterpiece
Negative prompt: blurry, low quality
text
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 965400086, Size: 512x512, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Lora hashes: "me: 5a3cd8a1b0f2", Version: v1.10.1"""


@pytest.mark.parametrize("prompt", ["a sks face, <lora:me:0.8>", "two\nlines", "Steps: 20", ""])
@pytest.mark.parametrize("negative", ["", "blurry, low: quality", "two\nlines"])
def test_what_is_written_reads_back(prompt, negative):
    told = Infotext(prompt, negative, FIELDS)
    assert read_infotext(str(told)) == told


def test_what_a1111_writes_is_read():
    told = read_infotext(A1111)
    assert told.prompt == "portrait of a sks face, (detailed:1.2), <lora:me:0.8>\nmasterpiece"
    assert told.negative == "blurry, low quality\ntext"
    assert told.fields["Lora hashes"] == "me: 5a3cd8a1b0f2"
    assert (told.fields["Sampler"], told.fields["Size"]) == ("Euler a", "512x512")
    assert str(told) == A1111


def test_a_prompt_without_settings_is_a_prompt():
    assert read_infotext("a face, at night: cold") == Infotext("a face, at night: cold")


def test_a_picture_carries_it_and_other_readers_find_it(tmp_path):
    parsers = pytest.importorskip("sd_parsers", reason="sd-parsers is not installed")
    told = Infotext("ein Gesicht \u2013 \u9854, <lora:me:0.8>", "blurry", {**FIELDS, "Model": "v1-5"})
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", str(told))
    assert read_picture(tmp_path / "a.png") == told
    found = parsers.ParserManager().parse(tmp_path / "a.png")
    assert found.generator.name == "AUTOMATIC1111"
    assert [prompt.value for prompt in found.prompts] == [told.prompt]
    assert [prompt.value for prompt in found.negative_prompts] == ["blurry"]
    (sampler,) = found.samplers
    assert (sampler.name, sampler.parameters["seed"]) == ("DPM++ 2M", "4294967295")
    assert sampler.model.name == "v1-5"


def test_pictures_that_say_nothing_and_files_that_are_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert read_picture(tmp_path / "plain.png") is None
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is not a readable PNG"):
        read_picture(tmp_path / "bad.png")
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "gone.png")
    bomb = PngInfo()
    bomb.add_text("parameters", "x" * 2_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=bomb)
    with pytest.raises(ValueError, match="is not a readable PNG"):
        read_picture(tmp_path / "bomb.png")
