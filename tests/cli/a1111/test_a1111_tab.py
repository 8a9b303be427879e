"""The tab in Automatic1111, driven through stand-ins for the parts of the webui that it uses."""

import ast
import importlib.util
import inspect
import os
import re
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from torch import nn

from cli.a1111.command import PACK
from cli.main import main

ROOT = Path(__file__).parents[3]
QUICK = {"checkpoint": "testbed", "name": "me", "steps": 1, "seed": 0, "find_face": False, "consent": True}


class Component:
    """Any component of a page: it is there, may be entered, and remembers what its events call."""

    made: ClassVar[list] = []

    def __init__(self, *arguments, **options):
        self.arguments, self.options, self.calls = arguments, options, []
        Component.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def click(self, function, inputs, outputs):
        self.calls.append((function, inputs, outputs))


class StandInGradio(ModuleType):
    def __getattr__(self, name):
        return Component


def stand_in(name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def stand_ins(seen, models: Path) -> dict[str, ModuleType]:
    """Module -> what the tab uses of it, in the names and arguments of the webui's own (see the test of its source)."""
    checkpoint = SimpleNamespace(filename="/models/v1-5.safetensors")

    def on_ui_tabs(callback, *, name=None):
        seen.tabs.append(callback)

    def unload_model_weights(sd_model=None, info=None):
        assert seen.lock.locked()
        sd_model.device = "cpu"

    def send_model_to_device(m):
        m.device = "cuda"

    def list_models():
        pass

    def create_refresh_button(refresh_component, refresh_method, refreshed_args, elem_id):
        refresh_method()
        assert refreshed_args() == {"choices": refresh_component.arguments[0]}

    page = SimpleNamespace(refresh=lambda: seen.refreshed.append("loras"))
    parts = {
        "call_queue": {"queue_lock": seen.lock},
        "script_callbacks": {"on_ui_tabs": on_ui_tabs},
        "shared": {"cmd_opts": SimpleNamespace(lora_dir=None), "models_path": str(models)},
        "sd_models": {
            "checkpoints_list": {"v1-5 [abc]": checkpoint}, "list_models": list_models,
            "checkpoint_aliases": {"v1-5": checkpoint, "v1-5 [abc]": checkpoint},
            "model_data": SimpleNamespace(sd_model=seen.model), "unload_model_weights": unload_model_weights,
            "send_model_to_device": send_model_to_device,
        },
        "ui_common": {"create_refresh_button": create_refresh_button},
        "ui_extra_networks": {"extra_pages": [page]},
    }  # fmt: skip
    return {name: stand_in(f"modules.{name}", **attributes) for name, attributes in parts.items()}


@pytest.fixture
def webui(tmp_path, monkeypatch):
    """A webui's folder with the tab installed by hdb, and the tab's module as the webui loads it."""
    (tmp_path / "webui" / "extensions").mkdir(parents=True)
    result = CliRunner().invoke(main, ["a1111", "install", str(tmp_path / "webui")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "webui" / "extensions" / "lidb-peft"
    assert (folder / "python.txt").read_text().strip() == sys.executable
    # Tests run in a checkout, which no environment need have installed.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / "python.txt").write_text(f"{python}\n")
    seen = SimpleNamespace(tabs=[], refreshed=[], model=SimpleNamespace(device="cuda"), lock=threading.Lock())
    modules = stand_ins(seen, tmp_path / "webui" / "models")
    monkeypatch.setitem(sys.modules, "modules", stand_in("modules", **modules))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"modules.{name}", module)
    monkeypatch.setitem(sys.modules, "gradio", StandInGradio("gradio"))
    monkeypatch.syspath_prepend(str(folder))
    for name in ("lidb_peft_process", "lidb_peft_tab"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(Component, "made", [])
    spec = importlib.util.spec_from_file_location("lidb_peft_tab", folder / "scripts" / "lidb_peft_tab.py")
    tab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tab)
    yield SimpleNamespace(
        python=python, tab=tab, folder=folder, loras=tmp_path / "webui" / "models" / "Lora", **vars(seen)
    )
    sys.modules.pop("lidb_peft_process", None)


def photo_file(portrait):
    """What the webui's Gradio hands over: an object with the file's name."""
    return SimpleNamespace(name=str(portrait))


def test_the_webui_gets_one_tab_whose_start_button_personalizes(webui):
    ((tab, title, name),) = webui.tabs[0]()
    assert (title, name) == ("lidb-peft", "lidb_peft_tab")
    assert isinstance(tab, Component)
    (start,) = [part for part in Component.made if part.arguments == ("Start",)]
    ((function, inputs, outputs),) = start.calls
    assert function is webui.tab.personalize
    assert len(inputs) == 7
    assert len(outputs) == 2


def test_a_photo_becomes_a_lora_in_the_webuis_folder(webui, portrait):
    shown = list(webui.tab.personalize([photo_file(portrait)], **QUICK))
    assert "saved" in shown[-1][0], shown
    assert shown[-1][1].size
    assert sorted(file.name for file in webui.loras.iterdir()) == ["me.json", "me.png", "me.safetensors"]
    with safe_open(webui.loras / "me.safetensors", "pt") as lora:
        assert lora.keys()
    assert len(shown) > 2  # it is told as it comes
    assert webui.refreshed == ["loras"]
    assert webui.model.device == "cuda"  # where the webui expects it for its next picture
    assert not webui.lock.locked()
    assert webui.tab.free_file(webui.loras, "me").name == "me-2.safetensors"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"consent": False}, "tick the box first"),
        ({"photos": None}, "there is no photo"),
        ({"checkpoint": "gone"}, "no checkpoint is chosen"),
        ({"checkpoint": "v1-5"}, "v1-5.safetensors does not exist"),  # which is called "v1-5 [abc]" by now
    ],
)
def test_what_cannot_be_done_is_a_sentence(webui, portrait, changed, told):
    *_, (text, picture) = webui.tab.personalize(**({"photos": [photo_file(portrait)]} | QUICK | changed))
    assert told in text.splitlines()[-1]
    assert picture is None


def test_a_photo_that_is_none_is_told_in_the_words_of_the_tab(webui, tmp_path):
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "grey.png")
    *_, (text, _) = webui.tab.personalize([photo_file(tmp_path / "grey.png")], **QUICK | {"find_face": True})
    assert "--no-crop" not in text
    assert 'untick "Find the face"' in text


def test_a_second_start_is_refused_and_stop_ends_the_first(webui):
    import lidb_peft_process

    hdb = lidb_peft_process.Hdb()
    run = hdb.start(["demo", "--out", str(webui.folder / "demo")], webui.tab.webui_waits())
    with pytest.raises(ValueError, match="already"):
        hdb.start(["--version"])
    until = time.monotonic() + 60
    while webui.model.device == "cuda" and time.monotonic() < until:
        time.sleep(0.1)
    hdb.stop()
    run.join(60)
    assert not hdb.is_running
    assert webui.model.device == "cuda"
    assert not (webui.folder / "demo" / "person.safetensors").exists()


def test_it_waits_for_the_webuis_pictures_and_can_be_stopped_while_it_waits(webui, portrait):
    with webui.lock:
        shown = webui.tab.personalize([photo_file(portrait)], **QUICK)
        assert next(shown)[0].startswith("starting")
        assert webui.model.device == "cuda"
        webui.tab.HDB.stop()
    assert "stopped before it started" in list(shown)[-1][0]
    assert not list(webui.loras.iterdir())


def test_a_page_that_is_closed_does_not_end_the_run(webui, portrait):
    shown = webui.tab.personalize([photo_file(portrait)], **QUICK)
    next(shown)
    shown.close()
    until = time.monotonic() + 120
    while webui.tab.HDB.is_running and time.monotonic() < until:
        time.sleep(0.1)
    assert (webui.loras / "me.safetensors").is_file()
    assert webui.refreshed == ["loras"]


def test_it_runs_in_the_python_that_installed_it(webui):
    import lidb_peft_process

    assert lidb_peft_process.hdb_python() == str(webui.python)
    assert lidb_peft_process.why_hdb_cannot_run() == ""
    (webui.folder / "python.txt").write_text("/nowhere/python\n")
    assert "run hdb a1111 install" in lidb_peft_process.why_hdb_cannot_run()
    with pytest.raises(ValueError, match="hdb cannot be started with /nowhere/python"):
        list(lidb_peft_process.Hdb().start(["--version"]).watch())


def test_uninstalling_takes_out_that_folder_and_keeps_a_foreign_one(webui, tmp_path):
    run = CliRunner().invoke
    again = run(main, ["a1111", "install", str(tmp_path / "webui")])
    assert again.exit_code == 1
    assert "uninstall it first" in again.output
    assert run(main, ["a1111", "uninstall", str(tmp_path / "webui")]).exit_code == 0
    assert not webui.folder.exists()
    webui.folder.mkdir()
    (webui.folder / "theirs.txt").write_text("x")
    assert "is kept" in run(main, ["a1111", "uninstall", str(tmp_path / "webui")]).output
    assert (webui.folder / "theirs.txt").exists()
    assert "is not a folder of Automatic1111" in run(main, ["a1111", "install", str(tmp_path)]).output


def test_the_extension_imports_nothing_of_lidb_peft():
    for file in (PACK / "install.py", PACK / "lidb_peft_process.py", PACK / "scripts" / "lidb_peft_tab.py"):
        text = file.read_text()
        assert not any(f"import {name}" in text or f"from {name} " in text for name in ("lidb_peft", "hypernet", "cli"))


@pytest.mark.parametrize("variable", ["A1111_DIR", "FORGE_DIR"])
def test_the_stand_ins_have_the_names_and_arguments_of_the_webuis_own_modules(variable, tmp_path):
    """The webui itself runs only with its own packages; its source says what its modules have."""
    checkout = Path(os.environ.get(variable, "nowhere"))
    if not (checkout / "modules").is_dir():
        pytest.skip(f"{variable} names no checkout")
    for name, module in stand_ins(SimpleNamespace(lock=None, model=None), tmp_path).items():
        declared = declarations(checkout / "modules" / f"{name.rpartition('.')[2]}.py")
        for attribute, value in vars(module).items():
            if not attribute.startswith("__"):
                assert attribute in declared, f"{name}.{attribute}"
                if callable(value):
                    assert declared[attribute] == list(inspect.signature(value).parameters), f"{name}.{attribute}"


def test_the_webui_finds_the_layer_of_each_name_in_our_files():
    """Its own function, out of its source, for the names of a Stable Diffusion 1."""
    checkout = Path(os.environ.get("A1111_DIR", "nowhere"))
    source = checkout / "extensions-builtin" / "Lora" / "networks.py"
    if not source.is_file():
        pytest.skip("A1111_DIR names no checkout")
    needed = ("re_digits", "re_x_proj", "re_compiled", "suffix_conversion", "convert_diffusers_name_to_compvis")
    theirs: dict = {"re": re}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        names = [getattr(node, "name", ""), *(getattr(one, "id", "") for one in getattr(node, "targets", ()))]
        if any(name in needed for name in names):
            exec(compile(ast.Module([node], []), str(source), "exec"), theirs)  # the tester's own checkout
    spec = importlib.util.spec_from_file_location("ldm", ROOT / "tests" / "hypernet" / "ldm_checkpoint.py")
    ldm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ldm)
    unet = UNet2DConditionModel(block_out_channels=(32,) * 4, attention_head_dim=8, cross_attention_dim=8)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert len(layers) > 200
    for layer in layers:
        module = ldm.unet_name(f"{layer}.weight", False).removesuffix(".weight").replace(".", "_")
        found = theirs["convert_diffusers_name_to_compvis"](f"lora_unet_{layer.replace('.', '_')}", False)
        assert found == f"diffusion_model_{module}"


def declarations(file: Path) -> dict:
    """Names at a module's top level -> the arguments of functions, None of all else."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id: None for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: None for alias in node.names}
    return found
