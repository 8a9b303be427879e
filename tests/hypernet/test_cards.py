"""Model cards, as the hub reads them, and what is uploaded with them; the hub is a list of calls."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

from converters import write_lora
from converters.sidecar import write_our_picture
from hypernet.cards import CONSENT, NO_CONSENT, card_path, hub_id, push, share, share_hypernetwork, write_card
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.personalized import lora_metadata
from testbed import miniature_hypernetwork_path

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class FakeHub:
    """Takes what `HfApi` takes, or fails as it does."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.error is not None:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def create_commit(self, repo_id, operations, commit_message):
        contents = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes()
                    if isinstance(each.path_or_fileobj, str | Path) else each.path_or_fileobj
                    for each in operations}  # fmt: skip
        self.calls.append(("create_commit", repo_id, contents))


@pytest.fixture
def lora(base, space, tmp_path):
    flat = space.init_lora(2, torch.Generator().manual_seed(0))
    path = tmp_path / "me.safetensors"
    write_lora(path, space.lora_factors(flat, 2), lora_metadata(base, "a sks face", 3),
               preview=Image.new("RGB", (32, 32), "red"))  # fmt: skip
    return path


def test_a_loras_card_is_one_that_the_hub_reads(lora):
    card = ModelCard(str(share(lora, SD15, "creativeml-openrail-m").card))
    told = card.data
    assert (told.base_model, told.license, told.instance_prompt) == (SD15, "creativeml-openrail-m", "a sks face")
    assert {"lora", "text-to-image", "diffusers", "template:sd-lora"} <= set(told.tags)
    assert told.widget == [{"text": "a sks face", "output": {"url": "me.png"}}]
    assert NO_CONSENT in card.text
    assert "![me](me.png)" in card.text
    assert "| Photos | 3 |" in card.text
    assert "pipeline.load_lora_weights" in card.text


def test_what_is_not_known_is_not_said(lora):
    card = ModelCard(str(share(lora, consent=True).card))
    assert card.data.base_model is None
    assert card.data.license is None
    assert CONSENT in card.text
    assert NO_CONSENT not in card.text


def test_the_files_go_with_the_card_in_one_commit_and_photos_do_not(lora):
    Image.new("RGB", (8, 8)).save(lora.with_name("me-sheet.png"))  # nobody says that it is ours
    write_our_picture(Image.new("RGB", (8, 8)), lora.with_name("me-preview.png"))
    shared, hub = share(lora, SD15), FakeHub()
    card = write_card(shared, card_path(lora))
    assert card.name == "me.md"
    assert push(shared, card, "someone/me", api=hub) == "https://huggingface.co/someone/me"
    made, committed = hub.calls
    assert made == ("create_repo", "someone/me", {"private": True, "repo_type": "model", "exist_ok": True})
    contents = committed[2]
    assert set(contents) == {"README.md", "me.safetensors", "me.json", "me.png", "me-preview.png"}
    assert contents["me.safetensors"] == lora.read_bytes()
    assert b'load_lora_weights("someone/me"' in contents["README.md"]
    assert b"OWNER/NAME" not in contents["README.md"]


def test_a_card_that_is_there_is_taken_as_it_is(lora):
    shared, path = share(lora), card_path(lora)
    write_card(shared, path)
    path.write_text(path.read_text() + "\nOf my own.\n")
    write_card(shared, path)
    hub = FakeHub()
    push(shared, path, "someone/me", api=hub)
    assert b"Of my own." in hub.calls[1][2]["README.md"]
    path.write_text("my diary")
    with pytest.raises(FileExistsError, match=r"me\.md is not a model card"):
        write_card(shared, path)


def test_a_hypernetworks_folder_is_shared_with_what_it_is_loaded_from():
    shared = share_hypernetwork(
        miniature_hypernetwork_path(), "someone/base", "apache-2.0", consent=True, how=["Ten steps."]
    )
    assert set(shared.files.values()) == {"config.json", "model.safetensors", "start.safetensors"}
    card = ModelCard(str(shared.card))
    assert (card.data.base_model, card.data.instance_prompt) == ("someone/base", "a sks face")
    assert "hypernetwork" in card.data.tags
    assert card.data.license == "apache-2.0"
    assert "--hypernet OWNER/NAME" in card.text
    assert "## How it was made\n\nTen steps." in card.text
    assert "trained on have agreed" in card.text
    assert f"| Layers | {len(HyperNetwork.from_pretrained(miniature_hypernetwork_path()).config.layers)} |" in card.text
    card = ModelCard(str(share(miniature_hypernetwork_path()).card))
    assert card.data.base_model is None
    assert "Nothing is said here of the consent" in card.text


def test_only_an_id_of_the_hub_is_told_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("someone/base@v1") == "someone/base"
    assert [hub_id(base) for base in ("testbed", "models/mine", str(tmp_path / "models"))] == ["", "", ""]


def http_error(status: int) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} Client Error")
    error.response = type("Response", (), {"status_code": status})()
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(401), "token has expired; run hf auth login"),
        (LocalTokenNotFoundError("no token"), "run hf auth login"),
        (http_error(403), "your token may not write to someone/me"),
        (http_error(500), r"refuses \(500 Client Error\)"),
        (ConnectionError("no route"), r"cannot be reached, or refuses \(no route\)"),
    ],
)
def test_a_hub_that_does_not_take_it_is_a_sentence_and_the_files_stay(lora, error, message):
    shared = share(lora)
    card = write_card(shared, card_path(lora))
    before = {path: path.read_bytes() for path in lora.parent.iterdir()}
    with pytest.raises(OSError, match=message) as told:
        push(shared, card, "someone/me", api=FakeHub(error))
    assert "nothing is lost" in str(told.value)
    assert {path: path.read_bytes() for path in lora.parent.iterdir()} == before


def test_our_own_mistakes_stay_tracebacks(lora):
    shared = share(lora)
    with pytest.raises(TypeError):
        push(shared, write_card(shared, card_path(lora)), "someone/me", api=FakeHub(TypeError("a mistake")))


@pytest.mark.parametrize("name", ["me", "a/b/c", "https://huggingface.co/a/b", "a/", "a b/c"])
def test_a_name_that_is_no_repository_is_refused_before_anything(lora, name):
    hub, shared = FakeHub(), share(lora)
    with pytest.raises(ValueError, match="write OWNER/NAME"):
        push(shared, write_card(shared, card_path(lora)), name, api=hub)
    assert not hub.calls


def test_what_is_no_lora_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        share(tmp_path / "notes.txt")
    with pytest.raises((ValueError, OSError), match="config"):
        share(tmp_path)
