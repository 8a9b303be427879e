"""What only a CUDA device shows: the same fits as on the CPU, whatever way of computing them is chosen."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from hypernet.bases.loading import load_base
from hypernet.devices import choose_device, free_bytes, limit_memory
from hypernet.fitting import engine
from hypernet.fitting.batch_size import choose_batch
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.fitting.replay import WARM_UP
from hypernet.recipe import FitConfig
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = WARM_UP + 5
CONFIG = FitConfig(STEPS, 1e-3, timesteps_per_step=2, background=0.5, preservation=1.0, max_grad_norm=1e9)
SAME = 1e-3  # relative difference of losses after some steps in float32: kernels sum in another order
HALF = 3e-2  # bfloat16 keeps 8 bits


@pytest.fixture(scope="module")
def load():
    """A function: options of `load_base` -> the miniature on CUDA and its space; float32 without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def load(device="cuda", **options):
        base = load_base(str(miniature_path()), device, **{"precision": "fp32"} | options)
        return base, LiDBSpace(base.adapted, miniature_lidb_config())

    yield load
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def people(new_subject):
    return [replace(new_subject(key, photos), class_prompt="a face") for key, photos in (("ann", 2), ("bob", 1))]


def error(found, expected):
    """Relative error by norm."""
    return ((found - expected).norm() / expected.norm()).item()


def test_cuda_fits_what_the_cpu_fits(load, people):
    """The noise is drawn on the CPU, and so the same."""
    _, expected = fit_theta(*load("cpu"), people, CONFIG)
    _, losses = fit_theta(*load(), people, CONFIG)
    assert error(losses, expected) < SAME


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_fit_equals_a_fit_kernel_by_kernel(load, people, precision):
    base, space = load(precision=precision)
    theta, losses = fit_theta(base, space, people, replace(CONFIG, graph="off"))
    captured, captured_losses = fit_theta(base, space, people, replace(CONFIG, graph="on"))
    tolerance = SAME if precision == "fp32" else HALF
    assert error(captured_losses, losses) < tolerance
    assert error(captured - space.theta_0, theta - space.theta_0) < 0.1  # Adam blows rounding up
    _, losses = fit_lora(base, space, people, replace(CONFIG, graph="off"), 4, theta)
    _, captured_losses = fit_lora(base, space, people, replace(CONFIG, graph="on"), 4, theta)
    assert error(captured_losses, losses) < tolerance


def test_each_captured_step_sees_its_own_noise(load, people):
    _, losses = fit_theta(*load(), people, replace(CONFIG, steps=WARM_UP + 8, lr=1e-9, graph="on"))
    assert len({round(loss, 6) for loss in losses[:, 0].tolist()}) == len(losses)


def test_half_precision_is_near_float32(load, people):
    one_step = replace(CONFIG, steps=1)
    _, expected = fit_theta(*load(), people, one_step)
    for precision in ("bf16", "fp16"):
        _, losses = fit_theta(*load(precision=precision), people, one_step)
        assert error(losses, expected) < HALF


@pytest.mark.usefixtures("checkpointing")
def test_checkpointing_changes_no_loss(load, people):
    base, space = load()
    _, expected = fit_theta(base, space, people, replace(CONFIG, gradient_checkpointing="off"))
    _, losses = fit_theta(base, space, people, replace(CONFIG, gradient_checkpointing="on"))
    assert error(losses, expected) < SAME


def test_xformers_gives_what_sdpa_gives(load, people):
    pytest.importorskip("xformers")
    _, expected = fit_theta(*load(precision="bf16"), people, CONFIG)
    _, losses = fit_theta(*load(precision="bf16", attention="xformers"), people, CONFIG)
    assert error(losses, expected) < HALF


def test_a_compiled_unet_fits_what_an_eager_one_does(load, people):
    _, expected = fit_theta(*load(), people, CONFIG)
    _, losses = fit_theta(*load(compile=True), people, CONFIG)
    assert error(losses, expected) < SAME


def test_8_bit_adam_learns_outside_of_the_graph(load, people):
    pytest.importorskip("bitsandbytes")
    base, space = load()
    config = replace(CONFIG, optimizer="adamw8bit", lr=1e-2)
    _, losses = fit_theta(base, space, people, replace(config, graph="off"))
    captured, captured_losses = fit_theta(base, space, people, replace(config, graph="on"))
    assert error(captured_losses, losses) < HALF
    assert (captured != space.theta_0).any()


def test_the_batch_that_auto_chooses_fits(load, new_subject):
    base, space = load(precision="bf16")
    config = replace(CONFIG, steps=WARM_UP + 2, graph="on")
    people = [replace(new_subject(f"{i}"), class_prompt="a face") for i in range(choose_batch(base, space, config))]
    assert len(people) > 1
    fit_theta(base, space, people, config)


def test_a_limit_is_the_end_of_the_memory():
    """In a process of its own, for a limit stays."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(_fill_up_to, 2 * 10**9).result()


def _fill_up_to(limit: int) -> bool:
    device = choose_device("cuda")
    limit_memory(device, limit)
    assert free_bytes(device) == limit
    torch.empty(limit // 2, dtype=torch.uint8, device=device)
    try:
        torch.empty(limit * 2, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError:
        return True
    return False


def test_a_step_that_cannot_be_captured_is_run_kernel_by_kernel(load, people, monkeypatch):
    """Such as one that waits for the device; the fits after it are captured as ever."""
    base, space = load()
    _, expected = fit_theta(base, space, people, replace(CONFIG, graph="off"))
    original = engine.base_losses

    def waiting(*arguments):
        losses = original(*arguments)
        losses[0].sum().item()
        return losses

    monkeypatch.setattr(engine, "base_losses", waiting)
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph"):
        _, losses = fit_theta(base, space, people, CONFIG)
    assert error(losses, expected) < SAME
    with pytest.raises(ValueError, match="cannot be captured in a CUDA graph"):
        fit_theta(base, space, people, replace(CONFIG, graph="on"))
    monkeypatch.undo()
    _, losses = fit_theta(base, space, people, replace(CONFIG, graph="on"))
    assert error(losses, expected) < SAME
