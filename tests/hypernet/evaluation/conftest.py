"""Small random networks of the real architectures, as folders, and pictures."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig

from testbed import miniature_path

PREPROCESSING = {"size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(miniature_path() / "tokenizer")
    tower = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id}
    eye = tower | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=tower | words, vision_config=eye, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processing = PREPROCESSING | {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return folder


@pytest.fixture
def pictures():
    """A function: count, side -> pictures that differ."""

    def make(count: int, side: int = 48) -> list[Image.Image]:
        noise = torch.rand(count, 6, 6, 3, generator=torch.Generator().manual_seed(count))
        small = [Image.fromarray((each * 255).byte().numpy()) for each in noise]
        return [each.resize((side, side), Image.Resampling.BICUBIC) for each in small]

    return make
