import numpy as np
import pytest
import torch

from hypernet.base_models.loading import load_base
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path
from testbed.likeness import Likeness, RecogniserStage, train_recogniser
from testbed.measuring import CHOICES, RECOGNISER_WIDTH, MeasuringNetwork, residual_trunk, to_pixels
from testbed.portraits import SPLITS, Scene, identity
from testbed.prompts import UNSEEN_WORDS
from testbed.protocol import photo
from testbed.trainer import Run, fixed_initialisation

PEOPLE = SPLITS["train"][:2]


@pytest.fixture(scope="module")
def base():
    return load_base(str(miniature_path()), device="cpu")


@pytest.fixture(scope="module")
def space(base):
    return LiDBSpace({"unet": base.denoiser}, miniature_lidb_config())


@pytest.fixture(scope="module")
def recogniser():
    with fixed_initialisation():
        return MeasuringNetwork(residual_trunk(RECOGNISER_WIDTH), RECOGNISER_WIDTH).requires_grad_(False)


def _loss(base, space, recogniser, theta, seed=0):
    told = base.encode_prompts(base.prepare_prompts([MINIATURE_RECIPE.trigger] * len(theta))).prompt_embeds
    photos = to_pixels([photo(person, 1) for person in PEOPLE])
    people = [identity(person) for person in PEOPLE]
    likeness = Likeness(base, space, recogniser)
    generator = torch.Generator().manual_seed(seed)
    return likeness([space.expand(theta)], told, people, [Scene(), Scene()], photos, generator)


def test_the_loss_reaches_each_persons_theta_and_neither_base_nor_recogniser(base, space, recogniser):
    theta = space.theta_0.repeat(2, 1, 1).requires_grad_()
    loss = _loss(base, space, recogniser, theta)
    assert (
        loss.item() == _loss(base, space, recogniser, theta).item() != _loss(base, space, recogniser, theta, 1).item()
    )
    loss.backward()
    assert theta.grad.abs().sum(dim=(1, 2)).min() > 0
    assert all(value.grad is None for value in (*base.denoiser.parameters(), *recogniser.parameters()))


def test_the_recogniser_sees_people_of_the_training_split_in_words_that_may_be_seen(base, tmp_path):
    network = train_recogniser(Run(tmp_path), base, RecogniserStage("recogniser", 4, 1, 0.1))
    assert not any(value.requires_grad for value in network.parameters())
    images = np.load(tmp_path / "recogniser-images.npy")
    assert images.shape == (4, 4, 32, 32, 3)
    from safetensors.numpy import load_file

    choices = load_file(tmp_path / "recogniser-labels.safetensors")["choices"]
    seen = {CHOICES[name][i] for column, name in enumerate(CHOICES) for i in choices[..., column].ravel()}
    assert not seen & {*UNSEEN_WORDS["validation"], *UNSEEN_WORDS["test"], "scarf"}
