"""A fit that somebody watches: intermediate LoRAs, sample pictures, its loss; it is stopped, and resumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hypernet import generate, personalize
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.recipe import FitConfig
from lidb_peft.sealed import read_tree, write_tree
from testbed import MINIATURE_RECIPE, miniature_lidb_config

QUICK = replace(MINIATURE_RECIPE, steps=7, timesteps_per_step=1, preservation=0.0, crop=False, likeness=0.0)


def same_factors(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True)
    )


@pytest.fixture(scope="module")
def watched(base, photo):
    reports = []
    result = personalize(
        photo, base, QUICK, miniature_lidb_config(), save_every=2, preview_every=3, on_step=reports.append
    )
    return result, reports


def test_intermediate_loras_are_those_of_the_one_run(watched, base, photo):
    result, _ = watched
    assert list(result.snapshots) == [2, 4, 6]
    unwatched = personalize(photo, base, QUICK, miniature_lidb_config())
    assert same_factors(result.factors, unwatched.factors)
    assert not unwatched.snapshots
    steps = [result.snapshots[step] for step in (2, 4, 6)]
    for earlier, later in zip([*steps], [*steps[1:], result.factors], strict=True):
        assert not same_factors(earlier, later)


def test_an_intermediate_lora_is_what_the_fit_held_at_that_step(watched, base, photo):
    result, _ = watched
    stopped = personalize(photo, base, QUICK, miniature_lidb_config(), on_step=(seen := []).append,
                          stop=lambda: len(seen) == 4)  # fmt: skip
    assert stopped.stopped_at == ("finetune LoRA", 4)
    assert same_factors(stopped.factors, result.snapshots[4])


def test_steps_are_reported_with_their_loss(watched):
    result, reports = watched
    assert [(report.stage, report.step, report.steps) for report in reports] == [
        ("finetune LoRA", step, 7) for step in range(1, 8)
    ]
    losses = result.losses["finetune LoRA"]
    assert losses.shape == (7, 1)
    assert reports[-1].loss == pytest.approx(float(losses.mean()))
    assert result.stopped_at is None


def test_sample_pictures_are_drawn_with_the_weights_so_far(watched, base):
    result, reports = watched
    assert [report.step for report in reports if report.picture is not None] == [3, 6]
    (expected,) = generate(base, "a sks face", result.space, result.snapshots[6], guidance=3.0)
    assert np.array_equal(np.array(reports[5].picture), np.array(expected))


def test_a_snapshot_is_saved_by_its_step(watched, tmp_path, assert_same_deltas):
    result, _ = watched
    result.save(tmp_path / "me-000004.safetensors", step=4)
    assert_same_deltas(tmp_path / "me-000004.safetensors", result.snapshots[4], 2e-3, floor=1e-9)
    with pytest.raises(ValueError, match="there is no LoRA of step 5; kept are those of 2, 4, 6"):
        result.save(tmp_path / "me.safetensors", step=5)


def test_a_fit_that_is_stopped_before_the_finetuning_is_theta_alone(base, photo):
    config = replace(QUICK, theta_steps=5, theta_lr=0.1)
    result = personalize(photo, base, config, miniature_lidb_config(), save_every=1, on_step=(seen := []).append,
                         stop=lambda: len(seen) == 2)  # fmt: skip
    assert result.stopped_at == ("fit theta", 2)
    assert result.finetuned is None
    assert not torch.equal(result.theta, result.space.theta_0)
    assert not result.snapshots  # which are of the last stage


@pytest.mark.parametrize("name", ["save_every", "preview_every"])
def test_no_steps_between_are_refused(base, photo, name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected 1 or more"):
        personalize(photo, base, QUICK, **{name: 0})


# ---- the engine's state ----


FIT = FitConfig(steps=9, lr=0.05, timesteps_per_step=2, seed=3)


def halted(fit, step: int, tmp_path):
    """Run a fit up to a step; returns its state as a file brings it back."""

    def observe(run):
        if run.step == step:
            write_tree(tmp_path / "state.safetensors", run.state())
        return run.step == step

    fit(observe=observe)
    return read_tree(tmp_path / "state.safetensors")


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_resumed_fit_ends_as_the_unbroken_one(base, space, new_subject, tmp_path, step):
    def of_theta(**options):
        return fit_theta(base, space, [new_subject("a", 2), new_subject("b")], FIT, **options)

    def of_lora(**options):
        return fit_lora(base, space, [new_subject("a", 2)], replace(FIT, preservation=0.0), rank=2, **options)

    for fit in (of_theta, of_lora):
        whole, losses = fit()
        resumed, all_losses = fit(resume=halted(fit, step, tmp_path))
        assert torch.equal(losses, all_losses)
        assert torch.equal(whole, resumed) if fit is of_theta else same_factors(whole[0], resumed[0])


def test_a_state_of_another_fit_is_refused(base, space, new_subject, tmp_path):
    state = halted(lambda **options: fit_lora(base, space, [new_subject("a")], FIT, rank=2, **options), 3, tmp_path)
    with pytest.raises(ValueError, match="of other photos, layers, rank or steps"):
        fit_lora(base, space, [new_subject("a")], FIT, rank=3, resume=state)
    with pytest.raises(ValueError, match="of other photos, layers, rank or steps"):
        fit_lora(base, space, [new_subject("a")], replace(FIT, steps=2), rank=2, resume=state)
