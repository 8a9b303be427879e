"""`hdb push`: nothing leaves without being asked for."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError


@pytest.fixture
def hub(monkeypatch):
    """What is pushed, instead of pushing."""
    calls = []

    def push(shared, card, repository, private=True, api=None):
        calls.append((repository, private, card.read_text()))
        return f"https://huggingface.co/{repository}"

    monkeypatch.setattr("hypernet.cards.push", push)
    return calls


def test_without_a_repository_the_card_is_written_and_nothing_is_uploaded(hdb, made, hub):
    lora = hdb.folder / "me.safetensors"
    lora.write_bytes((made / "me.safetensors").read_bytes())
    output = hdb.run("push", "me.safetensors", "--base", "someone/base")
    assert "wrote me.md" in output
    assert "would upload me.safetensors" in output
    assert not hub
    assert hdb.files() == ["me.md", "me.safetensors"]
    output = hdb.run("push", "me.safetensors", "someone/me")
    assert "used the existing card me.md" in output
    ((repository, private, card),) = hub
    assert (repository, private) == ("someone/me", True)
    assert "base_model: someone/base" in card


def test_a_likeness_is_published_only_with_consent(hdb, made, hub):
    (hdb.folder / "me.safetensors").write_bytes((made / "me.safetensors").read_bytes())
    message = hdb.fail("push", "me.safetensors", "someone/me", "--public", code=2)
    assert "--public requires --consent" in message
    hdb.run("push", "me.safetensors", "someone/me", "--public", "--consent")
    ((_, private, card),) = hub
    assert not private
    assert "has agreed" in card


def test_personalize_pushes_when_it_is_asked_to(hdb, personalize, portrait, hub):
    assert "write OWNER/NAME" in hdb.fail(*personalize(portrait), "--push-to-hub", "me")
    output = hdb.run(*personalize(portrait), "--out", "me.safetensors", "--push-to-hub", "someone/me")
    assert "uploaded me.safetensors and its card me.md to https://huggingface.co/someone/me" in output
    ((repository, private, card),) = hub
    assert (repository, private) == ("someone/me", True)
    assert "1 steps of finetuning" in card


def test_train_pushes_when_it_is_asked_to_and_only_then(hdb, draw_faces, trainable, hub):
    draw_faces("a.png", "b.png", "c.png")
    train = ("train", "faces", "--base", "testbed", "--no-crop", "--num-workers", 0, "--batch-size", 2, "--steps", 2,
             "--encoder", trainable, "--hidden-size", 32, "--k", 1, "--validation", 0)  # fmt: skip
    assert "write OWNER/NAME" in hdb.fail(*train, "--out", "net", "--push-to-hub", "faces")
    hdb.run(*train, "--out", "quiet")
    assert not hub
    assert not (hdb.folder / "quiet" / "last" / "README.md").exists()
    output = hdb.run(*train, "--out", "net", "--push-to-hub", "someone/faces")
    uploaded = "uploaded net/last and its card net/last/README.md to https://huggingface.co/someone/faces"
    assert output.splitlines()[-1] == uploaded
    ((repository, private, card),) = hub
    assert (repository, private) == ("someone/faces", True)
    assert card == (hdb.folder / "net" / "last" / "README.md").read_text()
    assert "2 steps of 2 people, learning rate 0.0001" in card
    assert "base_model:" not in card.partition("---\n\n")[0]  # a bundled base is not on the hub
    assert "Nothing is said here of the consent" in card


def test_a_token_that_has_expired_costs_no_file(hdb, personalize, portrait, monkeypatch):
    def expired(*arguments, **options):
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(error, "401 Client Error")
        error.response = SimpleNamespace(status_code=401)
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", expired)
    printed = hdb.run(*personalize(portrait), "--out", "me.safetensors", "--push-to-hub", "someone/me", code=1)
    sentence = "your token has expired; run hf auth login; nothing is lost: me.safetensors"
    assert sentence in printed.splitlines()[-1]
    kept = hdb.files()
    assert {"me.safetensors", "me.json", "me.md"} <= set(kept)
    assert sentence in hdb.fail("push", "me.safetensors", "someone/me")
    assert hdb.files() == kept
