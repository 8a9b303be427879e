import pytest
import torch

from hypernet.base_models.loading import load_base
from hypernet.network.hypernetwork import HyperNetwork
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path
from testbed.lessons import LIKENESS, Lessons, loss_weights, without_text_encoder
from testbed.train_hypernetwork import HYPERNETWORK, build_encoder


@pytest.fixture(scope="module")
def base():
    return load_base(str(miniature_path()), device="cpu")


@pytest.fixture(scope="module")
def spaces(base):
    config = miniature_lidb_config()
    return LiDBSpace(base.adapted, config), LiDBSpace({"unet": base.denoiser}, config)


@pytest.fixture(scope="module")
def whole(spaces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    build_encoder().save_pretrained(folder)
    return HyperNetwork.from_encoder(folder, spaces[0], "testbed", **HYPERNETWORK)


def test_without_its_text_encoder_a_hypernetwork_keeps_what_it_knows_of_the_other_layers(whole, spaces):
    everything, denoiser = spaces
    smaller = without_text_encoder(whole, denoiser)
    smaller.check_space(denoiser)
    rows = [everything.layer_names.index(name) for name in denoiser.layer_names]
    assert torch.equal(smaller.heads.weight, whole.heads.weight[rows])
    assert torch.equal(smaller.layer_positions, whole.layer_positions[rows])
    assert torch.equal(smaller.encoder.embeddings.cls_token, whole.encoder.embeddings.cls_token)
    assert (smaller.config.trigger, smaller.config.k) == (whole.config.trigger, whole.config.k)


def test_a_lesson_is_determined_by_its_number_and_teaches_every_part(base, whole, spaces):
    network = without_text_encoder(whole, spaces[1]).train()
    lessons = Lessons(base, spaces[1], network)
    loss = lessons(0)
    assert loss.item() == Lessons(base, spaces[1], network)(0).item() != lessons(1).item()
    loss.backward()
    unused = [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None]
    assert unused == []
    gradients = network.heads.weight.grad.abs().sum(dim=(1, 2)).tolist()
    # In the middle a picture is one token, of which attention to itself is 1 whatever its query and key are.
    one_token = {f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in "qk"}
    learning = [
        gradient for name, gradient in zip(spaces[1].layer_names, gradients, strict=True) if name not in one_token
    ]
    assert len(learning) == len(gradients) - 2
    assert min(learning) > 0
    assert not any(value.grad is not None for value in base.denoiser.parameters())


def test_likeness_joins_from_its_step_on(base, whole, spaces):
    network = without_text_encoder(whole, spaces[1]).train()
    asked = []

    def likeness(parts, told, people, scenes, photos, generator):
        asked.append((len(told), [scene.place + scene.style + scene.attire for scene in scenes]))
        return torch.tensor(100.0)

    lessons = Lessons(base, spaces[1], network, likeness=likeness, likeness_from=1)
    plain = Lessons(base, spaces[1], network)
    assert lessons(0).item() == plain(0).item()
    assert asked == []
    assert lessons(1).item() == pytest.approx(plain(1).item() + 100 * LIKENESS, abs=1e-4)
    (count, scenes), *rest = asked
    assert (count, rest) == (8, [])
    assert scenes.count("plainphotoshirt") == 4  # the others are by their prompts
    assert Lessons(base, spaces[1], network, seed=1)(0).item() != plain(0).item()


def test_the_inner_face_counts_most_and_a_background_as_said():
    for background in (0.0, 0.5):
        weights = loss_weights(8, background)
        assert weights.mean() == pytest.approx(1)
        assert weights[4, 4] == weights.max()
        assert weights[0, 0] == pytest.approx(background * float(weights[1, 4]), abs=1e-6)
