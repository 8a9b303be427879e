"""The page, served once for all tests at a free port of this machine; skipped where Gradio is not installed."""

import time
from functools import partial

import pytest

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'lidb-peft[ui]'")

from cli.web.app import launch
from hypernet import load_base

WAIT_S = 300


@pytest.fixture(scope="package")
def page(tmp_path_factory):
    """The work folder and the address of a page on the miniature."""
    folder = tmp_path_factory.mktemp("page") / "work"
    address = launch(folder, partial(load_base, device="cpu", precision="fp32"), "testbed", port=0, wait=False)
    yield folder, address
    import gradio

    gradio.close_all(verbose=False)


@pytest.fixture
def client(page):
    from gradio_client import Client

    return Client(page[1], verbose=False)


@pytest.fixture(scope="package")
def photo(portrait):
    from gradio_client import handle_file

    return handle_file(str(portrait))


@pytest.fixture(scope="session")
def finished():
    """A function: ask for a run's status until it is over."""

    def wait(client, key: str) -> dict:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            status = client.predict(key, api_name="/status")
            if status["state"] in ("done", "failed", "stopped"):
                return status
            time.sleep(0.3)
        raise TimeoutError(f"after {WAIT_S} s the run is still {status}")

    return wait
