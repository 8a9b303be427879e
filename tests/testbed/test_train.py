import pytest
import torch
from click.testing import CliRunner

from hypernet.base_models.loading import load_base
from hypernet.sampling import generate
from testbed.measuring import POSE, load_attribute_network, load_measuring_network
from testbed.train import main, psnr_db
from testbed.trainer import Run, Trainer


class InterruptedRunError(Exception):
    pass


def _train(out, stop_at=None, fraction=1.0):
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.zero_()
    losses = []

    def loss_of_step(step):
        if step == stop_at:
            raise InterruptedRunError
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        losses.append(loss.item())
        return loss

    Trainer("tiny", Run(out, fraction), model, num_steps=12, lr=0.05).run(loss_of_step, save_every_s=0)
    return losses, model.weight.detach().clone()


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "broken").mkdir()
    losses, weight = _train(tmp_path / "unbroken")
    with pytest.raises(InterruptedRunError):
        _train(tmp_path / "broken", stop_at=5)
    resumed_losses, resumed_weight = _train(tmp_path / "broken")
    assert resumed_losses == losses[5:]
    assert torch.equal(resumed_weight, weight)
    assert losses[-1] < losses[0]


def test_a_fraction_of_a_run_is_its_beginning(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "third").mkdir()
    losses, _ = _train(tmp_path / "whole")
    beginning, _ = _train(tmp_path / "third", fraction=1 / 3)
    assert beginning == losses[:4]


def test_the_recipe_makes_a_pipeline_from_nothing(tmp_path):
    arguments = ["--out", str(tmp_path), "--portraits", "70", "--vae-steps", "2", "--decoder-steps", "2",
                 "--measured-people", "5", "--measuring-steps", "1", "--attribute-people", "5",
                 "--attribute-steps", "1", "--steps", "1", "--threads", "1"]  # fmt: skip
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert load_measuring_network(tmp_path / "measuring.safetensors").embedding.out_features == 64
    assert load_attribute_network(tmp_path / "attributes.safetensors").pose.out_features == len(POSE)
    base = load_base(str(tmp_path / "miniature"), device="cpu")
    assert generate(base, ["a sks face"], num_steps=2)[0].size == (32, 32)
    assert base.tokenizer.tokenize("a sks face") == ["a</w>", "sks</w>", "face</w>"]


def test_psnr():
    assert psnr_db(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20.0)  # peak 2, error 0.2
