from types import SimpleNamespace

import pytest
import torch

from hypernet import devices
from hypernet.devices import choose_device, choose_dtype, describe_choice, free_bytes, limit_memory, memory_limited

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def cards(monkeypatch):
    """Pretend that there are so many CUDA cards, with or without bf16, and no Apple GPU."""

    def pretend(count: int, bf16: bool = True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if bf16 else (7, 5))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


def test_auto_takes_the_card_and_its_half_precision(cards):
    cards(1)
    assert choose_device("auto").type == "cuda"
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    cards(1, bf16=False)
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16


def test_auto_takes_the_processor_in_float32_where_there_is_no_card(cards):
    cards(0)
    assert choose_device("auto") == CPU
    assert choose_dtype("auto", CPU) == torch.float32
    assert describe_choice(CPU, torch.float32) == "cpu, fp32"


def test_auto_takes_an_apple_gpu(cards, monkeypatch):
    cards(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


def test_a_named_device_is_taken(cards):
    cards(2)
    assert choose_device("cpu") == CPU
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("device", "count", "text"),
    [
        ("cuda", 0, "--device cuda was asked for.*no CUDA device"),
        ("cuda:3", 2, "--device cuda:3 was asked for, but there are 2"),
        ("mps", 1, "no Apple GPU"),
        ("gpu", 1, "'gpu' is not a device"),
        ("", 1, "'' is not a device"),
        ("meta", 1, "'meta' is not supported"),
    ],
)
def test_a_device_that_is_not_there_is_refused(cards, device, count, text):
    cards(count)
    with pytest.raises(ValueError, match=text):
        choose_device(device)


def test_a_precision_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="--precision 'fp8' is unknown"):
        choose_dtype("fp8", CPU)
    with pytest.raises(ValueError, match="fp16 does not train on a CPU"):
        choose_dtype("fp16", CPU)
    assert choose_dtype("bf16", CPU) == torch.bfloat16


def test_a_memory_limit_is_a_smaller_card(cards, monkeypatch):
    """A card of 10 GB, of which others take 3 and this process 1, with 2 more in torch's cache."""
    cards(1)
    card, fractions = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * GB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GB, 10 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, card: fractions.append((share, card))
    )
    monkeypatch.setattr(devices, "_memory_limits", {})
    assert free_bytes(card) == 6 * GB
    with memory_limited(card, 2 * GB):
        assert free_bytes(card) == 1 * GB
    assert free_bytes(card) == 6 * GB
    assert fractions == [(0.2, 0), (1.0, 0)]
    fractions.clear()
    limit_memory(card, 4 * GB)
    assert fractions == [(0.4, 0)]
    assert free_bytes(card) == free_bytes(torch.device("cuda:0")) == 3 * GB
    with pytest.raises(ValueError, match=r"--max-vram is 11\.0 GB, and cuda has 10\.0 GB"):
        limit_memory(card, 11 * GB)
    with pytest.raises(ValueError, match="only a CUDA device has one"):
        limit_memory(CPU, 4 * GB)


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_on_windows_a_process_takes_no_more_than_is_free(monkeypatch, platform):
    """Or the driver would spill into the system's memory, and nothing would ever run out."""
    limits = {}
    monkeypatch.setattr(devices, "_memory_limits", {})
    monkeypatch.setattr(devices.sys, "platform", platform)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * GB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, card: limits.update({card: share * 16})
    )
    devices.tune_device(torch.device("cuda"))
    assert torch.backends.cudnn.benchmark
    assert limits == ({0: pytest.approx(0.95 * 11)} if platform == "win32" else {})


def test_a_limit_that_was_asked_for_stays_on_windows(monkeypatch):
    monkeypatch.setattr(devices, "_memory_limits", {1: 4 * GB})
    monkeypatch.setattr(devices.sys, "platform", "win32")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(devices, "limit_memory", None)
    devices.tune_device(torch.device("cuda:1"))
