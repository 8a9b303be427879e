import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save

from converters.formats.kohya import save_kohya
from converters.metadata import KohyaMetadata

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FACTORS = {Q: (torch.ones(2, 4), torch.ones(4, 2))}


def written_metadata(tmp_path, read_raw, **fields):
    save_kohya(tmp_path / "anna.safetensors", FACTORS, KohyaMetadata(**fields))
    return read_raw(tmp_path / "anna.safetensors")[1]


@pytest.mark.parametrize(
    ("fields", "version", "v2", "architecture", "resolution"),
    [
        ({}, "sd_v1", "False", "stable-diffusion-v1/lora", "512x512"),
        ({"family": "sd2"}, "sd_v2", "True", "stable-diffusion-v2-512/lora", "512x512"),
        ({"family": "sd2", "v_prediction": True}, "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "768x768"),
        ({"family": "sd1", "resolution_px": 64}, "sd_v1", "False", "stable-diffusion-v1/lora", "64x64"),
    ],
)
def test_each_family_says_what_kohya_and_a1111_look_for(
    tmp_path, read_raw, fields, version, v2, architecture, resolution
):
    metadata = written_metadata(tmp_path, read_raw, **fields)
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, v2)
    assert (metadata["modelspec.architecture"], metadata["modelspec.resolution"]) == (architecture, resolution)
    assert metadata["ss_network_module"] == "networks.lora"
    minimum = {"ss_network_dim", "ss_network_alpha", "ss_network_args", "sshs_model_hash", "sshs_legacy_hash"}
    assert minimum <= metadata.keys()


def test_sdxl_is_marked_so_that_a1111_does_not_take_it_for_sd1(tmp_path, read_raw):
    factors = {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (torch.ones(1, 4), torch.ones(4, 1))}
    save_kohya(tmp_path / "a.safetensors", factors, KohyaMetadata(family="sdxl"))
    metadata = read_raw(tmp_path / "a.safetensors")[1]
    assert metadata["ss_base_model_version"].startswith("sdxl_")
    assert metadata["modelspec.resolution"] == "1024x1024"


def test_the_trigger_is_a_clickable_tag_and_a_trigger_phrase(tmp_path, read_raw):
    metadata = written_metadata(tmp_path, read_raw, trigger="a sks face", num_photos=3, extra={"lidb.steps": "40"})
    (tags,) = json.loads(metadata["ss_tag_frequency"]).values()
    assert tags == {"a sks face": 3}
    assert metadata["modelspec.trigger_phrase"] == "a sks face"
    assert (metadata["ss_output_name"], metadata["ss_num_train_images"], metadata["lidb.steps"]) == ("anna", "3", "40")


def test_hashes_are_kohyas_and_metadata_beside_ss_does_not_change_them(tmp_path, read_raw):
    generator = torch.Generator().manual_seed(0)
    factors = {Q: (torch.randn(200, 3000, generator=generator), torch.randn(3000, 200, generator=generator))}
    found = []
    for title in ("one", "quite another title"):
        path = tmp_path / "a.safetensors"
        save_kohya(path, factors, KohyaMetadata(title=title))
        metadata = read_raw(path)[1]
        blob = save(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
        length = int.from_bytes(blob[:8], "little")
        assert len(blob) > 0x110000
        assert metadata["sshs_model_hash"] == hashlib.sha256(blob[8 + length :]).hexdigest()
        assert metadata["sshs_legacy_hash"] == hashlib.sha256(blob[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
        found.append((metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]))
    assert found[0] == found[1]


def test_the_same_lora_is_the_same_bytes(tmp_path):
    blobs = set()
    for _ in range(5):
        save_kohya(tmp_path / "a.safetensors", FACTORS, KohyaMetadata(trigger="a sks face"))
        blobs.add((tmp_path / "a.safetensors").read_bytes())
    assert len(blobs) == 1
    assert blobs.pop()[8:10] == b'{"'  # A1111 looks for these two characters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "sd15"}, "choose one of sd1, sd2, sdxl"),
        ({"output_name": "a:b"}, "leave out < > and :"),
        ({"extra": {"ss_v2": "True"}}, "ss_v2, which the file's own fields set"),
        ({"extra": {"steps": 3}}, "text to text"),
    ],
)
def test_metadata_that_readers_would_misread_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        KohyaMetadata(**fields)
