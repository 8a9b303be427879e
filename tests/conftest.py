"""One thread for all tests: the models are so small that a second one costs more than it gives on a busy machine."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test asks a network
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="hdb-assets-")  # data sets are prepared there on first use

import hypothesis
import pytest
import torch
from packaging.version import Version
from PIL import Image

atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code's
hypothesis.settings.load_profile("untimed")

_YUNET = "shared/data/face_detection_yunet_2023mar.onnx"  # beside a checkout, or further above
for _folder in Path(__file__).parents:
    if "HDB_YUNET" not in os.environ and (_folder / _YUNET).is_file():
        os.environ["HDB_YUNET"] = str(_folder / _YUNET)

CLEAR = 300  # times the heads' first weights: predictions as far from theta_0 as those of a trained network


@pytest.fixture(scope="session")
def make_hypernetwork():
    """A function: (space, options) -> a tiny hypernetwork; learned bases are no longer the frozen ones."""
    from transformers import ViTConfig

    from hypernet.network.config import HyperNetworkConfig
    from hypernet.network.hypernetwork import HyperNetwork

    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    decoder = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "k": 2}

    @torch.no_grad()
    def make(space, **options):
        network = HyperNetwork(HyperNetworkConfig.for_space(space, encoder, "mini", **decoder | options)).eval()
        network.heads.weight.mul_(CLEAR)
        for index, basis in enumerate((network.bases or {}).values()):
            basis.add_(0.1 * torch.randn(basis.shape, generator=torch.Generator().manual_seed(index)))
        return network

    return make


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A narrow SDXL of random weights in diffusers' layout: its blocks' places, 152 layers, 32 x 32 pixels."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from testbed import miniature_path

    first, second = (
        CLIPTokenizer.from_pretrained(miniature_path() / "tokenizer", pad_token=pad) for pad in ("<|endoftext|>", "!")
    )  # SDXL's differ in that alone

    def text_config(width: int, **settings) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(first), bos_token_id=first.bos_token_id, eos_token_id=first.eos_token_id,
            max_position_embeddings=first.model_max_length, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=2, **settings,
        )  # fmt: skip

    attended, plain = "CrossAttn{}Block2D".format, "{}Block2D".format
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = diffusers.StableDiffusionXLPipeline(
            unet=diffusers.UNet2DConditionModel(
                sample_size=8, block_out_channels=(16, 32, 32), norm_num_groups=8, attention_head_dim=(2, 2, 4),
                down_block_types=(plain("Down"), attended("Down"), attended("Down")),
                up_block_types=(attended("Up"), attended("Up"), plain("Up")),
                transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, cross_attention_dim=16 + 24,
                addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 20,
            ),
            text_encoder=CLIPTextModel(text_config(16)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(24, projection_dim=20, hidden_act="gelu")),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8, 8, 16), down_block_types=(plain("DownEncoder"),) * 3,
                up_block_types=(plain("UpDecoder"),) * 3, norm_num_groups=8, mid_block_add_attention=False,
                sample_size=32, scaling_factor=0.13025,
            ),
            tokenizer=first, tokenizer_2=second, add_watermarker=False,
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                timestep_spacing="leading",
            ),
        )  # fmt: skip
    folder = tmp_path_factory.mktemp("bases") / "narrow-sdxl"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def yunet():
    """Skips a test that finds faces with YuNet where there is no copy of its file."""
    from hypernet.inputs.yunet import unavailable

    if reason := unavailable():
        pytest.skip(f"without YuNet: {reason}")


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """A narrow FLUX.1 of random weights in diffusers' layout: two blocks of each kind, 32 x 32 pixels."""
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from testbed import miniature_path

    clip = transformers.CLIPTokenizer.from_pretrained(miniature_path() / "tokenizer")
    letters = [(letter, -float(rank + 3)) for rank, letter in enumerate("\u2581etaoinshrdlcumwfgypbvk,jxqz[].")]
    unigram = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = transformers.PreTrainedTokenizerFast(
        tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    plain = "{}Block2D".format
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
                joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 2, 2),
            ),
            text_encoder=transformers.CLIPTextModel(
                transformers.CLIPTextConfig(
                    vocab_size=len(clip), bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
                    max_position_embeddings=clip.model_max_length, hidden_size=16, intermediate_size=32,
                    num_hidden_layers=2, num_attention_heads=2,
                )
            ),
            text_encoder_2=transformers.T5EncoderModel(
                transformers.T5Config(
                    vocab_size=len(unigram.get_vocab()), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2,
                    feed_forward_proj="gated-gelu", decoder_start_token_id=0,
                )
            ),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8, 16), down_block_types=(plain("DownEncoder"),) * 2,
                up_block_types=(plain("UpDecoder"),) * 2, norm_num_groups=8, mid_block_add_attention=False,
                latent_channels=4, sample_size=32, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            tokenizer=clip, tokenizer_2=t5,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
        )  # fmt: skip
    folder = tmp_path_factory.mktemp("bases") / "narrow-flux"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def portrait(tmp_path_factory):
    """A drawn portrait in a file, to be used with ``crop=False``: a drawing is no face to the detector."""
    from testbed.demo import draw_photos

    path = tmp_path_factory.mktemp("photos") / "portrait.png"
    picture, _ = draw_photos(person=3)
    picture.resize((96, 96), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture(scope="session")
def checkpointing():
    """Skips a test of a UNet's gradient checkpointing where diffusers is too old for it."""
    if Version(version("diffusers")) < Version("0.33"):
        pytest.skip("gradient checkpointing needs diffusers 0.33 or newer")


@pytest.fixture(scope="session")
def start_pair():
    """A function: Python's arguments -> two processes that meet as those of torch's launcher do, without its start."""

    def start(*arguments) -> list[subprocess.Popen]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        path = os.pathsep.join(path for path in sys.path if path)
        shared = os.environ | {"PYTHONPATH": path, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=shared | {"RANK": rank, "LOCAL_RANK": rank}, text=True,
            )
            for rank in ("0", "1")
        ]  # fmt: skip

    return start


@pytest.fixture(scope="session")
def narrow_checkpoint(tmp_path_factory):
    """A narrow Stable Diffusion 1 of random weights in one file, in its first authors' names, for 64 x 64 pixels."""
    from safetensors.torch import save_file

    sys.path.insert(0, str(Path(__file__).with_name("hypernet")))
    try:
        from ldm_checkpoint import checkpoint_tensors
        from narrow import narrow_sd1
    finally:
        sys.path.pop(0)
    pipeline = narrow_sd1()
    file = tmp_path_factory.mktemp("bases") / "narrow.safetensors"
    stated = {"modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon"}
    save_file(checkpoint_tensors(SimpleNamespace(**pipeline.components, text_encoder_2=None)), file, metadata=stated)
    return file
