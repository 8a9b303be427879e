import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from testbed.drawing import draw
from testbed.measuring import (
    CHOICES,
    CONTINUOUS,
    POSE,
    MeasuringNetwork,
    attributes_path,
    labels,
    load_attribute_network,
    load_measuring_network,
    measuring_path,
    pose,
    save_measuring_network,
    to_pixels,
)
from testbed.portraits import SPLITS, Scene, identity, random_scene


@pytest.fixture(scope="module")
def network():
    return load_measuring_network()


def test_pixels():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 1, 0] = (255, 0, 51)
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels[0, :, 1, 0].tolist() == pytest.approx([1, -1, -0.6])


def test_labels_are_the_portrait_s_own():
    who, scene = identity(5), Scene(style="neon", place="snow", attire="crown")
    continuous, choices = labels(who, scene)
    assert dict(zip(CONTINUOUS, continuous, strict=True))["skin"] == np.float32(who.skin)
    named = {name: values[index] for (name, values), index in zip(CHOICES.items(), choices, strict=True)}
    assert (named["style"], named["place"], named["attire"]) == ("neon", "snow", "crown")
    assert (named["hair_colour"], named["freckles"]) == (who.hair_colour, who.freckles)


def test_it_knows_people_scenes_and_attributes_it_never_saw(network):
    people = SPLITS["test"][:100]
    rng = np.random.default_rng(0)
    scenes = [[random_scene(rng), random_scene(rng, plain=True), random_scene(rng, plain=True)] for _ in people]
    shots = [[draw(identity(p), scene[i]) for p, scene in zip(people, scenes, strict=True)] for i in range(3)]
    anything, first, second = (network(to_pixels(shot)) for shot in shots)
    nearest = (first.embedding @ second.embedding.T).argmax(dim=1)
    assert (nearest == torch.arange(100)).float().mean() > 0.9
    assert torch.allclose(first.embedding.norm(dim=1), torch.ones(100), atol=1e-5)
    for name in ("style", "place", "attire"):
        right = [found == getattr(scene[0], name) for found, scene in zip(anything.choice(name), scenes, strict=True)]
        assert np.mean(right) > 0.9
    hair = [found == identity(p).hair_style for found, p in zip(first.choice("hair_style"), people, strict=True)]
    assert np.mean(hair) > 0.85
    skin = torch.tensor([identity(p).skin for p in people])
    assert (first.continuous["skin"] - skin).abs().mean() < 0.1


def test_the_second_network_knows_people_by_their_attributes_and_how_they_are_posed():
    network = load_attribute_network()
    people = SPLITS["test"][:100]
    rng = np.random.default_rng(0)
    scenes = [[random_scene(rng, plain=True) for _ in range(2)] for _ in people]
    first, second = (
        network(to_pixels([draw(identity(p), shots[i]) for p, shots in zip(people, scenes, strict=True)]))
        for i in range(2)
    )
    nearest = (first.embedding @ second.embedding.T).argmax(dim=1)
    assert (nearest == torch.arange(100)).float().mean() > 0.9
    for name in ("skin", "eye_spacing", "eye_size", "face_width"):
        true = torch.tensor([getattr(identity(p), name) for p in people])
        assert (first.continuous[name] - true).square().mean() < 0.5 * true.var()
    true = torch.from_numpy(np.stack([pose(shots[0]) for shots in scenes]))
    for index, name in enumerate(POSE):
        assert (first.pose[name] - true[:, index]).square().mean() < 0.5 * true[:, index].var(), name


def test_poses_vary_by_one_over_random_scenes():
    rng = np.random.default_rng(0)
    found = np.stack([pose(random_scene(rng)) for _ in range(1000)])
    assert np.allclose(found.mean(axis=0), 0, atol=0.15)
    assert np.allclose(found.std(axis=0), 1, atol=0.1)


def test_both_networks_are_small():
    assert max(path.stat().st_size for path in (measuring_path(), attributes_path())) < 2.1e6


def test_it_was_trained_on_people_of_its_own():
    ranges = [set(split) for split in SPLITS.values()]
    assert sum(map(len, ranges)) == len(set.union(*ranges))


def test_weights_are_saved_in_half_precision(tmp_path):
    network = MeasuringNetwork()
    save_measuring_network(network, tmp_path / "network.safetensors")
    again = load_measuring_network(tmp_path / "network.safetensors")
    assert all(value.dtype == torch.float16 for value in load_file(measuring_path()).values())
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())
