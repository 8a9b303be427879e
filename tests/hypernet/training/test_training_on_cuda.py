"""Training a hypernetwork on a CUDA device: in every precision, resumed, and on the card that was asked for."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import ViTConfig

import hypernet.training.validation as validation
from hypernet.base_models.loading import load_base
from hypernet.inputs.people import open_people
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import TrainConfig
from hypernet.training import loop
from hypernet.training.loop import train
from hypernet.training.state import STATE_FILE
from lidb_peft import LiDBSpace
from lidb_peft.sealed import read_tree
from testbed import miniature_lidb_config, miniature_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("datasets_cache"),
]

ENCODER = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
)
CONFIG = TrainConfig(
    steps=6, lr=3e-3, warmup_steps=1, batch_size=2, denoising=1.0, target_distance=0.0, timesteps_per_step=2,
    validation=0.4, crop=False, log_every=1, checkpoint_every=3, num_workers=2,
)  # fmt: skip
HALF = 5e-2  # relative difference of losses that bfloat16's 8 bits may make in a few steps


@pytest.fixture
def run(face_folder, tmp_path, monkeypatch):
    """A function: (name of a folder, device, precision, changes of the config) -> (the folder, its network)."""
    monkeypatch.setattr(validation, "PICTURE_STEPS", 1)
    monkeypatch.setattr(validation, "PICTURED", 1)

    def train_into(name, device="cuda", precision="fp32", resume=False, progress=None, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate's are one for a process
        base = load_base(str(miniature_path()), device, precision=precision)
        space = LiDBSpace(base.adapted, miniature_lidb_config())
        sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "k": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = HyperNetwork(HyperNetworkConfig.for_space(space, ENCODER, "mini", **sizes))
        if resume:
            network = HyperNetwork.from_pretrained(tmp_path / name / "last")
        config = replace(CONFIG, **changes)
        train(open_people(face_folder), base, network, tmp_path / name, config, resume=resume, progress=progress)
        return tmp_path / name, network

    return train_into


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", HALF), ("fp16", HALF)])
def test_a_card_trains_as_the_cpu_does(run, precision, tolerance):
    folder, network = run("card", precision=precision)
    assert next(network.parameters()).dtype == torch.float32
    expected, _ = run("cpu", device="cpu", num_workers=0)
    assert error(losses(folder), losses(expected)) < tolerance


def test_half_precision_scales_its_loss_and_keeps_the_scale(run):
    folder, _ = run("half", precision="fp16")
    assert read_tree(folder / STATE_FILE)["parts"]["scaler"]["scale"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_training_goes_on_as_an_unbroken_one(run, precision):
    def stop(stage, done, total):
        if done == 3:
            raise KeyboardInterrupt

    unbroken, _ = run("unbroken", precision=precision)
    with pytest.raises(KeyboardInterrupt):
        run("resumed", precision=precision, progress=stop)
    resumed, _ = run("resumed", precision=precision, resume=True)
    assert error(losses(resumed), losses(unbroken)) < HALF


def test_its_optimizer_is_fused(run, monkeypatch):
    """Which needs parameters that are on the card already when it is made."""
    made, original = [], loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", lambda *given: made.append(original(*given)) or made[-1])
    run("fused")
    assert made[0].defaults["fused"]
    assert {parameter.device.type for group in made[0].param_groups for parameter in group["params"]} == {"cuda"}


def test_its_optimizer_may_keep_its_state_in_8_bits(run):
    pytest.importorskip("bitsandbytes")
    folder, _ = run("eight", optimizer="adamw8bit")
    assert torch.isfinite(losses(folder)).all()


def test_a_hypernetwork_predicts_what_it_predicts_on_the_cpu(run):
    _, network = run("trained")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        found, expected = network.to("cuda")(pixels.cuda()).cpu(), network.to("cpu")(pixels)
    assert error(found, expected) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_card_that_was_asked_for_is_trained_on(run):
    before = torch.cuda.memory_allocated(0)
    folder, network = run("second", device="cuda:1")
    assert {parameter.device for parameter in network.parameters()} == {torch.device("cuda:1")}
    assert torch.cuda.memory_allocated(0) == before
    assert torch.isfinite(losses(folder)).all()
