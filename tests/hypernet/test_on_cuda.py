"""What only a CUDA device shows: the same fits as on the CPU, whatever way of computing them is chosen."""

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cli.main import main
from hypernet.base_models.loading import load_base
from hypernet.check import check
from hypernet.devices import choose_device, free_bytes, limit_memory, release_memory
from hypernet.fitting import engine
from hypernet.fitting.batch_size import LARGEST_BATCH, _peaks, choose_batch
from hypernet.fitting.engine import KeptStep, Subject, fit_lora, fit_theta
from hypernet.fitting.replay import WARM_UP
from hypernet.recipe import FitConfig
from hypernet.sampling import generate
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.safe_read import read_tensors
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
    if precision == "fp32":  # Adam blows rounding up: in half precision two processors differ by a sixth of an update
        assert error(captured - space.theta_0, theta - space.theta_0) < 0.1
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


def test_a_kept_graph_fits_the_next_people_as_one_of_their_own(load, people, new_subject):
    base, space = load()
    others = [replace(new_subject(key, photos), class_prompt="a face") for key, photos in (("eve", 1), ("dan", 2))]
    config, kept = replace(CONFIG, graph="on"), KeptStep()
    theta, _ = fit_theta(base, space, people, config)
    fit_lora(base, space, people, config, 4, theta, kept=kept)
    graph = kept.step.replay.graph
    assert graph is not None
    _, losses = fit_lora(base, space, others, config, 4, theta + 0.1, kept=kept)
    assert kept.step.replay.graph is graph
    _, expected = fit_lora(base, space, others, config, 4, theta + 0.1)
    assert error(losses, expected) < SAME


def test_a_graph_is_captured_anew_after_the_models_have_moved(load, people):
    """As when photos were encoded in their place: the old graph would read memory that is somebody else's."""
    base, space = load()
    config, kept = replace(CONFIG, graph="on"), KeptStep()
    _, expected = fit_theta(base, space, people, config, kept=kept)
    graph = kept.step.replay.graph
    taken = [parameter.data for parameter in base.unet.parameters()]  # or they might come back to the same places
    base._encode_alone(torch.zeros(1, 3, base.size_px, base.size_px))
    assert base.device.type == "cuda"
    del taken
    _, losses = fit_theta(base, space, people, config, kept=kept)
    assert kept.step.replay.graph is not graph
    assert error(losses, expected) < SAME


def test_fits_in_a_row_take_no_more_memory_each_time(load, people):
    base, space = load()
    taken = []
    for _ in range(4):
        fit_lora(base, space, people, replace(CONFIG, graph="on"), 4)
        release_memory(base.device)
        taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len({allocated for allocated, _ in taken[1:]}) == 1
    assert taken[3][1] <= taken[1][1]


def test_the_fastest_kernels_are_looked_for(load):
    load()
    assert torch.backends.cudnn.benchmark


@pytest.mark.skipif(sys.platform != "win32", reason="drivers for Windows alone spill into the system's memory")
def test_memory_ends_on_windows_too(load):
    base, _ = load()
    free, total = torch.cuda.mem_get_info()
    assert free_bytes(base.device) < total
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(free + torch.cuda.memory_reserved(), dtype=torch.uint8, device=base.device)


def test_photos_are_encoded_and_pictures_drawn_as_on_the_cpu(load):
    (base, _), (expected, _) = load(), load("cpu")
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert error(base.encode_photos(pixels), expected.encode_photos(pixels)) < SAME
    assert base.vae.device.type == "cpu"
    found, right = (generate(each, ["a face", "a hat"], num_steps=4) for each in (base, expected))
    for picture, other in zip(found, right, strict=True):
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(other, np.int16)).mean() < 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pictures_in_half_precision_are_not_black(load, precision):
    base, _ = load(precision=precision)
    assert np.asarray(generate(base, "a face", num_steps=4)[0]).std() > 5


def test_pictures_are_decoded_one_at_a_time(load):
    base, _ = load()
    latents = torch.randn(8, *base.latent_shape, device=base.device)
    peaks = []
    for count in (1, 8):
        vae = base.pipeline().vae
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            vae.decode(latents[:count])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 3 * peaks[0]


def test_a_photo_that_does_not_fit_beside_the_models_is_encoded_alone(load, monkeypatch):
    """Stable Diffusion XL's, on a card of 8 or 10 GB."""
    base, _ = load()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected, where, encode = base.encode_photos(pixels), [], base._encode

    def full(pixels, device):
        where.append(base.unet.device.type)
        if len(where) == 1:
            torch.empty(2 * torch.cuda.get_device_properties(device).total_memory, dtype=torch.uint8, device=device)
        return encode(pixels, device)

    monkeypatch.setattr(base, "_encode", full)
    assert error(base.encode_photos(pixels), expected) < SAME
    assert where == ["cuda", "cpu"]
    assert {model.device.type for model in base.adapted.values()} == {"cuda"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sdxl_is_captured_too(sdxl_folder, people, precision):
    base = load_base(str(sdxl_folder), "cuda", precision=precision)
    space = LiDBSpace(base.adapted, LiDBConfig(down_dim=8, up_dim=6))
    _, losses = fit_theta(base, space, people, replace(CONFIG, graph="off"))
    _, captured = fit_theta(base, space, people, replace(CONFIG, graph="on"))
    assert error(captured, losses) < (SAME if precision == "fp32" else HALF)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_flux_in_few_bits_is_near_flux(flux_folder, quantize):
    pytest.importorskip("bitsandbytes")
    mean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    person = Subject("ann", torch.cat([mean, torch.full_like(mean, -4.0)], dim=1), "a sks face", "a face")
    losses = []
    for options in ({}, {"quantize": quantize}):
        base = load_base(str(flux_folder), "cuda", precision="bf16", **options)
        space = LiDBSpace(base.adapted, LiDBConfig(down_dim=8, up_dim=6))
        losses.append(fit_theta(base, space, [person], replace(CONFIG, graph="off"))[1])
    assert error(losses[1], losses[0]) < 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_card_is_the_only_one_that_is_used(load, people):
    before = torch.cuda.memory_allocated(0)
    base, space = load("cuda:1")
    assert base.device == torch.device("cuda:1")
    _, losses = fit_theta(base, space, people, replace(CONFIG, graph="on"))
    assert torch.cuda.memory_allocated(0) == before
    _, expected = fit_theta(*load("cpu"), people, CONFIG)
    assert error(losses, expected) < SAME


def test_a_person_is_personalised_from_end_to_end(portrait, tmp_path):
    out = tmp_path / "me.safetensors"
    result = CliRunner().invoke(main, ["personalize", str(portrait), "--base", "testbed", "--no-crop", "--device",
                                       "cuda", "--steps", "8", "--out", str(out)])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"me.safetensors", "me.json", "me.png"}
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(out)[0].values())


def test_the_device_is_checked():
    base = load_base(str(miniature_path()), "cuda")
    report = check(base, miniature_lidb_config())
    assert [finding.detail for finding in report.failed] == []
    assert {f.name: f.outcome for f in report.findings}["CUDA graph equals eager"] == "ok"


# ---- the end of the memory: in processes of their own, for a limit stays ----


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def numbers(count):
    """People made of numbers."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 1, 4, 8, 8, generator=generator)
    moments = torch.cat([mean, torch.full_like(mean, -4.0)], dim=2)
    return [Subject(f"{number}", own, "a sks face", "a face") for number, own in enumerate(moments)]


def miniature(precision):
    base = load_base(str(miniature_path()), "cuda", precision=precision)
    return base, LiDBSpace(base.adapted, miniature_lidb_config())


@pytest.mark.usefixtures("checkpointing")
def test_auto_goes_on_with_checkpointing_where_the_memory_ends():
    found = in_a_process(_fit_under_a_limit)
    assert found["peak without"] > 1.5 * found["peak with"]
    assert found["losses are finite"]
    assert len(found["told"]) == 1
    assert "gradient checkpointing is on now" in found["told"][0]
    assert found["left"] < 4e6


def _fit_under_a_limit() -> dict:
    base, space = miniature("fp32")
    people, peaks = numbers(64), {}
    config = replace(CONFIG, steps=2, timesteps_per_step=4, graph="off")
    for checkpointing in ("on", "off"):
        torch.cuda.reset_peak_memory_stats()
        fit_theta(base, space, people, replace(config, gradient_checkpointing=checkpointing))
        peaks[checkpointing] = torch.cuda.max_memory_allocated()
        release_memory(base.device)
    limit_memory(base.device, sum(peaks.values()) // 2)
    before = torch.cuda.memory_allocated()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, losses = fit_theta(base, space, people, config)
    release_memory(base.device)
    return {
        "peak without": peaks["off"], "peak with": peaks["on"], "told": [str(one.message) for one in told],
        "losses are finite": bool(torch.isfinite(losses).all()), "left": torch.cuda.memory_allocated() - before,
    }  # fmt: skip


def test_the_batch_that_auto_chooses_fits_into_the_memory_there_is():
    chosen, losses_are_finite = in_a_process(_choose_under_a_limit)
    assert 4 < chosen < LARGEST_BATCH
    assert losses_are_finite


def _choose_under_a_limit() -> tuple[int, bool]:
    base, space = miniature("bf16")
    config = replace(CONFIG, steps=WARM_UP + 2, timesteps_per_step=4, graph="on", gradient_checkpointing="off")
    one, two = _peaks(base, space, replace(config, steps=1), 4)
    release_memory(base.device)
    limit_memory(base.device, torch.cuda.memory_allocated() + int((one + 15 * (two - one)) / 0.85))
    chosen = choose_batch(base, space, config, 4)
    _, losses = fit_lora(base, space, numbers(chosen), config, 4, space.theta_0)
    return chosen, bool(torch.isfinite(losses).all())


def test_a_capture_that_runs_out_of_memory_lets_go_of_what_it_held(load, people, monkeypatch):
    base, space = load()
    _, expected = fit_theta(base, space, people, replace(CONFIG, graph="off"))
    original, total = engine.base_losses, torch.cuda.get_device_properties(base.device).total_memory

    def hungry(*arguments):
        losses = original(*arguments)
        if torch.cuda.is_current_stream_capturing():
            held = torch.empty(2**28, dtype=torch.uint8, device=base.device)
            held = [held, torch.empty(2 * total, dtype=torch.uint8, device=base.device)]
        return losses

    release_memory(base.device)
    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(engine, "base_losses", hungry)
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph"):
        _, losses = fit_theta(base, space, people, CONFIG)
    assert error(losses, expected) < SAME
    assert torch.cuda.memory_allocated() - before < 2**26


def test_a_limit_is_the_end_of_the_memory():
    assert in_a_process(_fill_up_to, 2 * 10**9)


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
