import pytest
import torch

from hypernet.base_models.loading import load_base
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path
from testbed.lessons import Lessons
from testbed.starting import Start, StartLessons


@pytest.fixture(scope="module")
def lessons():
    base = load_base(str(miniature_path()), device="cpu")
    return Lessons(base, LiDBSpace({"unet": base.denoiser}, miniature_lidb_config()))


def test_a_start_is_judged_by_what_it_becomes(lessons, monkeypatch):
    """The gradient is that of the fitted weights, taken as the start's own."""
    size = lessons.space.lora_size(MINIATURE_RECIPE.rank)
    start = Start(0.05 * torch.randn(size, generator=torch.Generator().manual_seed(0)))
    fits = []

    def fit(base, space, people, config, rank, theta, bases, start):
        fits.append((len(people), config.steps))
        return torch.stack([start + 0.01 * row for row in range(len(people))]), None

    monkeypatch.setattr("testbed.starting.fit_flat_lora", fit)
    loss = StartLessons(lessons, start, None, most_steps=3)(0)
    loss.backward()
    ((count, steps),) = fits
    assert count == 8
    assert 1 <= steps <= 3

    fitted = torch.stack([start.flat.detach() + 0.01 * row for row in range(8)]).requires_grad_()
    same = lessons.loss(lessons.draw(0), lambda rows: [lessons.space.split_lora(fitted[rows], MINIATURE_RECIPE.rank)])
    same.backward()
    assert same.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(fitted.grad.sum(dim=0), start.flat.grad, rtol=1e-3, atol=1e-6)
    assert start.flat.grad.norm() > 0
