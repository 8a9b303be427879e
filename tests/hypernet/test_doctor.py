import sys

import torch

from hypernet import doctor


def test_it_names_the_versions_and_the_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    rows = dict(doctor.report())
    assert rows["torch"] == torch.__version__.split("+")[0] or rows["torch"] == torch.__version__
    assert rows["CUDA"].startswith("no: ")
    assert rows["auto chooses"] == "cpu, fp32, because no GPU is usable; float32 is the CPU's own precision"


def test_a_missing_package_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    rows = dict(doctor.report())
    assert "pip install diffusers" in rows["diffusers"]
    assert "not installed" in rows["xformers"]
    assert "pip install bitsandbytes" in rows["bitsandbytes"]


def test_it_describes_every_card(monkeypatch):
    class Card:
        name, total_memory, major, minor = "Some Card", 12 * 2**30, 7, 5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: Card.name)
    rows = dict(doctor.report())
    assert rows["cuda:0"] == rows["cuda:1"] == "Some Card, 12 GiB, compute capability 7.5"
    assert rows["auto chooses"] == "cuda (Some Card), fp16, because a CUDA device is there, without bf16"


def test_it_imports_no_optional_package():
    before = set(sys.modules)
    doctor.report()
    assert not {"xformers", "bitsandbytes"} & (sys.modules.keys() - before)
