"""DINO and CLIP: shapes, preprocessing, batching, revisions, against transformers' and torchmetrics' own."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hypernet.evaluation import models
from hypernet.evaluation.models import load_clip, load_dino, revision_of


def test_dinos_features_are_those_of_the_pictures_token_and_of_unit_length(dino_folder, pictures):
    dino = load_dino(dino_folder)
    found = dino.features(pictures(3, side=32))
    array = np.stack([np.asarray(each) for each in pictures(3, side=32)]) / 255
    pixels = (array - dino.settings["image_mean"]) / dino.settings["image_std"]
    with torch.no_grad():
        model = AutoModel.from_pretrained(dino_folder).eval()
        expected = model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def test_pictures_are_seen_alike_alone_and_in_batches(dino_folder, clip_folder, pictures, monkeypatch):
    shown = pictures(5)
    for network in (load_dino(dino_folder), load_clip(clip_folder)):
        whole = network.features(shown)
        monkeypatch.setattr(models, "AT_ONCE", 2)
        torch.testing.assert_close(network.features(shown), whole)
        torch.testing.assert_close(torch.cat([network.features([each]) for each in shown]), whole)
        monkeypatch.undo()


def test_clip_prepares_pictures_as_its_own_processor_does(clip_folder, pictures):
    clip, shown = load_clip(clip_folder), pictures(2, side=64)
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    theirs = processor(images=shown, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(models._prepared(shown, clip.settings), theirs, atol=0.03, rtol=0)


def test_clip_t_is_torchmetrics_clip_score(clip_folder, pictures, monkeypatch):
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal", reason="torchmetrics is not installed")
    clip, shown = load_clip(clip_folder), pictures(2, side=32)
    texts = ["a face in snow", "a pencil drawing of a face"]
    ours = (clip.features(shown) * clip.text_features(texts)).sum(dim=1)

    class Processor:
        tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
        images = CLIPImageProcessorPil.from_pretrained(clip_folder)

        def __call__(self, text=None, images=None, **options):
            if text is None:
                return self.images(images=images, return_tensors="pt")
            return self.tokenizer(text, return_tensors="pt", padding=True)

    model = CLIPModel.from_pretrained(clip_folder).eval()
    for name in ("get_image_features", "get_text_features"):  # of transformers 5, which torchmetrics does not know yet
        theirs = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *given, theirs=theirs: getattr(theirs(*given), "pooler_output", None))
    for picture, text, found in zip(shown, texts, ours.tolist(), strict=True):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        score = multimodal.clip_score(pixels, text, model_name_or_path=lambda: (model, Processor()))
        assert max(found, 0) * 100 == pytest.approx(float(score), abs=0.05)


def test_long_prompts_are_cut_to_what_clip_reads(clip_folder):
    clip = load_clip(clip_folder)
    assert clip.text_features(["word " * 100, "a face"]).shape == (2, 16)


def test_revisions_are_the_hubs_commit_or_a_digest_of_the_weights(dino_folder, tmp_path):
    commit = tmp_path / "models--x--y" / "snapshots" / ("0a" * 20)
    shutil.copytree(dino_folder, commit)
    assert revision_of(commit) == "0a" * 20
    copied = shutil.copytree(dino_folder, tmp_path / "dino")
    before = revision_of(copied)
    assert before == revision_of(dino_folder)
    with open(copied / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert revision_of(copied) != before


@pytest.mark.parametrize(("load", "what"), [(load_dino, "DINO"), (load_clip, "CLIP")])
def test_a_network_that_is_not_there_is_named(load, what):
    with pytest.raises(
        FileNotFoundError, match=f"the {what} 'nobody/nothing' is not a folder here.*--{what.lower()} none"
    ):
        load("nobody/nothing")


def test_a_dino_is_no_clip_and_preprocessing_must_be_told(dino_folder, tmp_path):
    with pytest.raises(ValueError, match="is a 'vit' and no CLIP"):
        load_clip(dino_folder)
    copied = shutil.copytree(dino_folder, tmp_path / "dino")
    (copied / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    with pytest.raises(ValueError, match="lacks image_mean, image_std"):
        load_dino(copied)
