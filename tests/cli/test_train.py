"""`hdb train`."""

import json

import pytest
import torch

from converters import describe
from hypernet.network.hypernetwork import HyperNetwork

ANY_NETWORK = ("--base", "testbed", "--no-crop", "--workers", 0, "--batch", 2, "--steps", 2, "--log-every", 1)
QUICK = (*ANY_NETWORK, "--encoder", "vit", "--hidden-size", 32, "--rounds", 2)


@pytest.fixture
def faces(draw_faces, trainable):
    return draw_faces("0.png", "1.png", "2.png")


def test_train_makes_a_hypernetwork_with_and_without_targets(hdb, faces):
    output = hdb.run("train", faces, *QUICK, "--out", "net", "--validation", 0.3)
    assert "trained 2 steps: loss" in output
    assert "at best on held-out people (net/best)" in output
    assert "wrote net/last" in output
    assert output.splitlines()[-1] == "use it: hdb personalize me.jpg --base testbed --hypernet net/best"
    assert {"net/best/config.json", "net/samples/step-0000002.png", "net/log.jsonl"} <= set(hdb.files())
    assert HyperNetwork.from_pretrained(hdb.folder / "net" / "last").config.k == 2
    assert "net holds a training already" in hdb.fail("train", faces, *QUICK, "--out", "net")
    assert "lr 0.0001 (here 0.1)" in hdb.fail(
        "train", faces, *QUICK, "--out", "net", "--validation", 0.3, "--resume", "--lr", 0.1
    )
    assert "net trains a hypernetwork with k 2 (here 3); resume" in hdb.fail(
        "train", faces, *QUICK, "--out", "net", "--validation", 0.3, "--resume", "--rounds", 3
    )
    hdb.run("preoptimize", faces, "--base", "testbed", "--no-crop", "--steps", 1, "--timesteps", 1, "--out", "targets")
    hdb.run("train", faces, *QUICK, "--targets", "targets", "--denoising", 0, "--validation", 0, "--out", "other")
    output = hdb.run("train", faces, *QUICK, "--targets", "targets", "--denoising", 0, "--validation", 0, "--out",
                     "other", "--resume")  # fmt: skip
    assert "trained 2 steps: no steps were left" in output
    assert output.splitlines()[-1] == "use it: hdb personalize me.jpg --base testbed --hypernet other/last"
    lines = [json.loads(line) for line in (hdb.folder / "other" / "log.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"step", "loss", "target_distance", "people", "lr"}] * 2


def test_the_denoiser_alone_or_all_layers_are_predicted_and_have_targets(hdb, faces):
    few = ("--base", "testbed", "--no-crop", "--steps", 1, "--timesteps-per-step", 1)
    for adapt, count in (("denoiser", 128), ("all", 176)):
        chosen = () if adapt == "denoiser" else ("--adapt", adapt)
        hdb.run("preoptimize", faces, *few, *chosen, "--out", f"targets-{adapt}")
        arguments = ("train", faces, *QUICK, *chosen, "--validation", 0, "--out", f"net-{adapt}")
        hdb.run(*arguments, "--targets", f"targets-{adapt}")
        assert len(HyperNetwork.from_pretrained(hdb.folder / f"net-{adapt}" / "last").config.layers) == count
    assert "net-all trains a hypernetwork with other layers (here those of --adapt denoiser)" in hdb.fail(
        "train", faces, *QUICK, "--validation", 0, "--out", "net-all", "--targets", "targets-all", "--resume"
    )
    message = hdb.fail("train", faces, *QUICK, "--out", "net", "--targets", "targets-all")
    assert "holds targets for unet and text_encoder, not for unet; pass the --adapt" in message


def test_train_goes_on_from_another_training(hdb, faces):
    hdb.run("train", faces, *QUICK, "--out", "net", "--validation", 0, "--learned-bases", "--token", "ohwx")
    further = ("train", faces, *ANY_NETWORK, "--init-from", "net/last", "--preservation", 1, "--validation", 0)
    hdb.run(*further, "--lr", 1e-12, "--out", "further")
    before, after = (HyperNetwork.from_pretrained(hdb.folder / name / "last") for name in ("net", "further"))
    assert (after.config.token, after.config.k) == ("ohwx", 2)
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-9)
    lines = [json.loads(line) for line in (hdb.folder / "further" / "log.jsonl").read_text().splitlines()]
    assert all(line["preservation"] > 0 for line in lines)
    output = hdb.run(*further, "--lr", 1e-12, "--out", "further", "--resume")
    assert "no steps were left" in output
    assert "--k cannot be set with --hypernet" in hdb.fail(*further, "--out", "x", "--rounds", 2, code=2)
    assert "nowhere" in hdb.fail("train", faces, *ANY_NETWORK, "--init-from", "nowhere", "--out", "x")


def test_personalize_takes_what_train_has_made(hdb, faces):
    hdb.run("train", faces, *QUICK, "--out", "net", "--validation", 0, "--learned-bases")
    hdb.run("personalize", "faces/0.png", "faces/1.png", "--base", "testbed", "--hypernet", "net/last", "--no-crop",
            "--no-preview", "--steps", 1, "--rank", 2, "--out", "me.safetensors")  # fmt: skip
    assert describe("me.safetensors").ranks == (3,)


def test_train_tells_what_is_wrong_in_a_sentence(hdb, faces):
    train = ("train", faces, *QUICK, "--out", "net")
    assert "net holds no training to resume" in hdb.fail(*train, "--resume")
    assert "targets does not exist; name a folder that hdb preoptimize wrote" in hdb.fail(
        *train, "--targets", "targets"
    )
    assert "nothing would be learned" in hdb.fail(*train, "--denoising", 0)
    assert "'step' is not one of 'cosine', 'linear'" in hdb.fail(*train, "--schedule", "step", code=2)
    assert "the tracker 'abacus' is not installed" in hdb.fail(*train, "--tracker", "abacus")
    (hdb.folder / "empty").mkdir()
    assert "empty holds no images" in hdb.fail("train", "empty", *QUICK, "--out", "net")
