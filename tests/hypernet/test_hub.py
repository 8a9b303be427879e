"""What the hub's own library makes of a server's replies, in one sentence that says what to do."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from hypernet.hub import HubError, hub_folder, local_or_hub_folder, repository_files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that makes a hub of this machine give one reply to everything: (status, headers, body)."""
    replies = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = replies["reply"]
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

        def reply(status, headers=None, body=b"{}"):
            replies["reply"] = status, headers or {}, body

        yield reply
        server.shutdown()


def reason(call, *arguments):
    with pytest.raises(HubError) as caught:
        call(*arguments)
    return str(caught.value)


REPLIES = [
    (404, {"X-Error-Code": "RepoNotFound"}, "no such repository, or it is private; check the name, or log in"),
    (401, {"X-Error-Code": "RepoNotFound"}, "no such repository, or it is private; check the name, or log in"),
    (403, {"X-Error-Code": "GatedRepo"}, "terms have to be accepted; do so on https://huggingface.co/some/model, and"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "has no revision old; check what follows the @"),
    (401, {"X-Error-Message": "Invalid credentials in Authorization header"},
     "refuses the access token, which may have expired; unset HF_TOKEN"),
    (403, {"X-Error-Message": "not with this token"}, "the access token may not read it; make one on"),
    (429, {}, "too many requests from here; wait some minutes, or log in"),
    (418, {}, r"the hub says: .*418"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "headers", "expected"), REPLIES)
def test_every_refusal_of_the_hub_says_what_to_do(hub, status, headers, expected):
    hub(status, headers)
    for told in (
        reason(hub_folder, "some/model@old", ("config.json",)),
        reason(repository_files, "some/model", "old"),
    ):
        assert re.search(expected, told), told
        assert "\n" not in told


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_is_to_be_asked_later(hub, status):
    hub(status)
    assert f"fails now (status {status}); try again later" in reason(hub_folder, "some/model", ("config.json",))


def test_without_a_connection_the_connection_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    for told in (reason(hub_folder, "some/model", ("*",)), reason(repository_files, "some/model", "main")):
        assert re.fullmatch(
            r"the hub cannot be reached \(.*\); check the connection and the proxy, and try again", told
        )


def test_a_connection_that_breaks_off_is_said_too(hub):
    hub(200, {"Content-Length": "1000"}, b"{")
    assert "the hub cannot be reached" in reason(hub_folder, "some/model", ("config.json",))


def test_offline_says_how_to_go_online(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in reason(hub_folder, "some/model", ("config.json",))
    assert "HF_HUB_OFFLINE is set" in reason(repository_files, "some/model", "main")


def test_what_is_no_id_is_a_path_that_is_not_there():
    assert "no id of a repository (owner/name) either; check the path" in reason(hub_folder, "/no/such/folder", ())


def test_a_full_disk_is_no_fault_of_the_connection(monkeypatch):
    def full(name, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert "No space left on device; mend that and try again" in reason(hub_folder, "some/model", ("config.json",))


def test_a_folder_is_taken_as_it_is_and_a_file_refused(tmp_path):
    assert local_or_hub_folder(tmp_path, "the encoder", ()) == tmp_path
    (tmp_path / "net.safetensors").touch()
    with pytest.raises(NotADirectoryError, match="is a file; name the folder of the encoder"):
        local_or_hub_folder(tmp_path / "net.safetensors", "the encoder", ())
    told = reason(local_or_hub_folder, tmp_path / "none", "the DINO", (), "or pass --dino none")
    assert re.search("the DINO .* is not a folder here and could not be downloaded .*, or pass --dino none$", told)
