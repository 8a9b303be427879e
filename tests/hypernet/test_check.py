"""What `hdb check` finds, on the miniature on a processor."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from hypernet import check as checks
from hypernet.base_models.full_size import random_sd15
from hypernet.check import check
from testbed import miniature_lidb_config


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(checks, "_STEPS", 1)
    monkeypatch.setattr(checks, "_TIMED_STEPS", 2)


@pytest.mark.usefixtures("quick", "checkpointing")
def test_a_processor_passes_and_what_it_lacks_is_said(base):
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    told = []
    report = check(base, miniature_lidb_config(), lambda done, total: told.append((done, total)))
    outcomes = {finding.name: finding.outcome for finding in report.findings}
    assert report.failed == []
    assert outcomes["bf16 near fp32"] == "ok"
    assert outcomes["step of the base given"] == "measured"
    assert outcomes["CUDA graph equals eager"] == outcomes["step at full size"] == "skipped"
    assert outcomes["checkpointing where the memory ends"] == "skipped"
    assert told == [(number + 1, len(outcomes)) for number in range(len(outcomes))]
    assert json.loads(json.dumps(report.to_json()))["machine"]["device"] == "cpu, fp32"
    assert base.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [([1.0, 1.5], "losses differ by 2.5e-01"), ([1.0, float("nan")], "losses differ by nan")],
)
def test_what_differs_is_a_finding_and_never_raised(base, monkeypatch, losses, sentence):
    results = iter([torch.tensor([1.0, 1.2]), torch.tensor(losses)])
    monkeypatch.setattr(checks, "_losses", lambda *arguments, **options: next(results))
    finding = checks._found("bf16 near fp32", lambda: checks._bf16_near_fp32(base, miniature_lidb_config()))
    assert finding.outcome == "failed"
    assert sentence in finding.detail


def test_what_a_machine_raises_is_a_finding():
    def broken():
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    finding = checks._found("a check", broken)
    assert (finding.outcome, finding.detail.count("\n")) == ("failed", 0)
    assert "no kernel image" in finding.detail


def test_the_full_size_is_that_of_stable_diffusion(base):
    meta = {name: copy.deepcopy(model).to("meta") for name, model in base.adapted.items()}
    full = random_sd15(replace(base, **meta))
    sizes = {name: sum(value.numel() for value in model.parameters()) for name, model in full.adapted.items()}
    assert sizes == {"unet": 859_520_964, "text_encoder": 123_060_480}
    assert full.latent_shape == (4, 64, 64)
