"""The scripts of speed and memory, small and in this process; no test here looks at what they measure."""

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from inspect import signature

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import Subject, fit_lora
from hypernet.recipe import FitConfig
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_lidb_config

SCRIPT = """
import sys
import torch

steps = int(sys.argv[sys.argv.index("--max_train_steps") + 1])
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.AdamW([weight])
for _ in range(steps):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function: (script's module, options) -> what it writes; its rows are made in this process."""
    import costs

    monkeypatch.setattr(costs, "ProcessPoolExecutor", ThreadPoolExecutor)

    def start(module, *options):
        out = tmp_path / "rows.json"
        monkeypatch.setattr("sys.argv", [module.__file__, *options, "--device", "cpu", "--out", str(out)])
        module.main()
        return json.loads(out.read_text())

    return start


@pytest.mark.parametrize(("copies", "preservation"), [(2, 0.0), (1, 1.0), (3, 1.0)])
def test_the_bare_passes_are_those_that_the_engine_asks_for(base, copies, preservation):
    from costs import Passes, bare_passes

    space = LiDBSpace(base.adapted, miniature_lidb_config())
    subjects = [Subject(key, torch.randn(1, 8, 8, 8), "a sks face", "a face") for key in "ab"]
    recipe = replace(MINIATURE_RECIPE, likeness=0.0)
    fit = replace(recipe, steps=1, timesteps_per_step=copies, preservation=preservation).lora_fit
    asked = []

    def note(model, inputs):
        # the engine asks the base's own text encoder once, before the first step
        if model is base.unet or torch.is_grad_enabled():
            asked.append((type(model).__name__, len(inputs[0]), torch.is_grad_enabled()))

    def passes(call):
        asked.clear()
        handles = [model.register_forward_pre_hook(note) for model in base.adapted.values()]
        call()
        for handle in handles:
            handle.remove()
        return sorted(asked)

    by_engine = passes(lambda: fit_lora(base, space, subjects, fit, 1))
    assert passes(lambda: bare_passes(base, Passes.of(fit, people=2), steps=1)(lambda: None)) == by_engine
    assert by_engine


def test_the_best_step_counts_and_what_comes_before_the_first_does_not(monkeypatch):
    import costs

    times = iter([100.0, 103.0, 104.0, 106.0])
    monkeypatch.setattr(costs, "clock", lambda device: next(times))
    seconds, peak = costs.measure(lambda tick: [tick(step, 4) for step in range(4)], torch.device("cpu"))
    assert seconds == 1.0
    assert peak > 0


def test_a_row_has_a_process_of_its_own():
    from costs import alone

    assert alone(os.getpid) != os.getpid()


def test_personalization_speed_has_all_rows(run, base, monkeypatch, tmp_path):
    import personalization_speed

    monkeypatch.setattr(personalization_speed, "load_base", lambda *_: copy.deepcopy(base))
    monkeypatch.setattr(personalization_speed, "PROFILED_STEPS", 1)
    script = tmp_path / "train_dreambooth_lora.py"
    script.write_text(SCRIPT)
    found = run(personalization_speed, "--steps", "2", "--diffusers-script", str(script), "--profile")
    (title, rows), (_, (profiled,)) = found["tables"].items()
    assert "2 steps" in title
    measured = {row["row"]: row for row in rows}
    assert measured.pop("diffusers' script, cached latents")["not available"].endswith("has no --cache_latents")
    assert len(measured) == 6
    assert all(row["s a step"] > 0 and row["x bare"] > 0 for row in measured.values())
    assert profiled["operators a step"] > 1000
    assert "aten::" in (tmp_path / "rows.profile.txt").read_text()


def test_fitting_cost_of_memory_and_scaling(run, base, monkeypatch):
    import fitting_cost

    monkeypatch.setattr(fitting_cost, "load_base", lambda *_: base)
    for name, few in (("SIDES", (1.0,)), ("COPIES", (1,)), ("PEOPLE", (2,)), ("RANKS", (1,))):
        monkeypatch.setattr(fitting_cost, name, few)
    rows, least = run(fitting_cost, "memory", "--steps", "2")["tables"].values()
    assert [row["checkpointing"] for row in rows] == ["off", "on"]
    assert least[0] in rows
    (rows,) = run(fitting_cost, "scaling", "--steps", "2")["tables"].values()
    assert [row["changed"] for row in rows] == ["people", "layers", "layers", "layers", "rank"]
    assert all(row["s a step"] > 0 for row in rows)


def test_the_variants_are_options_that_there_are():
    from fitting_cost import variant_cases

    for case in variant_cases():
        assert set(case.load) <= set(signature(load_base).parameters)
        assert set(case.fit) <= {field.name for field in fields(FitConfig)}


def test_what_models_take_is_counted_without_numbers():
    """By the sizes that Stable Diffusion 1.5's UNet and CLIP-L are known to have."""
    import memory_count

    with FakeTensorMode(allow_non_fake_inputs=True):
        base = memory_count.build_base("sd1")
        assert memory_count.model_bytes(*base.adapted.values()) == 2 * (859_520_964 + 123_060_480)
        assert memory_count.count_step(base, 1, True) < memory_count.count_step(base, 1, False)


def test_what_flux_takes_is_counted_by_its_known_size():
    """FLUX.1-dev's transformer has 11,901,408,320 numbers."""
    import memory_count

    with FakeTensorMode(allow_non_fake_inputs=True):
        base = memory_count.build_base("flux1")
        assert memory_count.model_bytes(base.transformer) == 2 * 11_901_408_320
        assert memory_count.quantized_bytes(base.transformer, "nf4") < 7.5e9
        assert memory_count.quantized_bytes(base.transformer, "int8") < 12.8e9
