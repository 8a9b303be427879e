"""`hdb personalize --hypernet`."""

import shutil
from pathlib import Path

import pytest

import testbed
from converters import describe
from hypernet import request
from hypernet.base_models.loading import load_base
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path


@pytest.fixture(scope="module")
def saved(make_hypernetwork, tmp_path_factory):
    """A folder of hypernetworks: the miniature's ``net``, ``learned``, and one of other layers, ``other``."""
    folder = tmp_path_factory.mktemp("hypernetworks")
    base = load_base(str(miniature_path()), device="cpu")
    space = LiDBSpace(base.adapted, miniature_lidb_config())
    make_hypernetwork(space, token="ohwx").save_pretrained(folder / "net")
    make_hypernetwork(space, learned_bases=True).save_pretrained(folder / "learned")
    make_hypernetwork(LiDBSpace({"unet": base.unet.mid_block}, miniature_lidb_config())).save_pretrained(
        folder / "other"
    )
    return folder


@pytest.fixture
def run(portrait):
    """The arguments of a personalisation on the miniature that ends with the prediction."""
    return lambda *arguments: ("personalize", portrait, "--base", "testbed", "--no-crop", "--no-preview",
                               "--steps", 0, "--out", "me.safetensors", *arguments)  # fmt: skip


def stages(output):
    """The stages between loading and writing."""
    (line,) = [line for line in output.splitlines() if line.startswith("took ")]
    told = [stage.rsplit(" ", 2)[0] for stage in line.removeprefix("took ").split(", ")]
    assert told[:3] == ["import", "load base", "prepare photos"]
    assert told[-1] == "export"
    return told[3:-1]


def test_steps_0_leave_the_prediction_alone(hdb, run, saved):
    output = hdb.run(*run("--hypernet", saved / "net"))
    assert stages(output) == ["load hypernetwork", "predict"]
    assert '"a ohwx face <lora:me:1>"' in output
    assert hdb.files() == ["me.json", "me.safetensors"]
    description = describe("me.safetensors")
    assert description.ranks == (1,)
    assert description.trigger_words == ("a ohwx face",)


def test_the_hypernetworks_config_is_read_once(hdb, run, saved, monkeypatch):
    reads, read = [], request.read_config
    monkeypatch.setattr(request, "read_config", lambda source: reads.append(source) or read(source))
    hdb.run(*run("--hypernet", saved / "net"))
    assert len(reads) == 1


def test_the_lora_is_finetuned_and_theta_only_if_it_is_asked_for(hdb, run, saved):
    output = hdb.run(*run("--hypernet", saved / "learned", "--steps", 1, "--rank", 2))
    assert stages(output) == ["load hypernetwork", "predict", "finetune LoRA"]
    assert describe("me.safetensors").ranks == (3,)
    output = hdb.run(*run("--hypernet", saved / "learned", "--theta-steps", 1, "--overwrite"))
    assert stages(output) == ["load hypernetwork", "predict", "fit theta"]


def test_the_miniature_has_its_own_hypernetwork(hdb, run, saved, portrait, monkeypatch):
    monkeypatch.setattr(testbed, "miniature_hypernetwork_path", lambda: saved / "net")
    output = hdb.run(*run("--save-theta", "theta.safetensors"))
    assert f"starting at the prediction of the hypernetwork {saved / 'net'}" in output
    assert stages(output) == ["load hypernetwork", "predict"]
    own = Path("me.safetensors").read_bytes()
    hdb.run("personalize", portrait, "--base", miniature_path(), "--hypernet", "testbed", "--no-crop", "--no-preview",
            "--steps", 0, "--out", "me.safetensors", "--overwrite")  # fmt: skip
    assert Path("me.safetensors").read_bytes() == own
    assert "predict" not in stages(hdb.run(*run("--hypernet", "none", "--theta-steps", 1, "--overwrite")))
    assert stages(hdb.run(*run("--from-theta", "theta.safetensors", "--theta-steps", 0, "--overwrite"))) == []
    assert "--hypernet none" in hdb.fail(*run("--token", "sks"))


def test_a_hypernetwork_that_does_not_ship_says_the_way_on(hdb, run, monkeypatch):
    monkeypatch.setattr(testbed, "__file__", str(hdb.folder / "__init__.py"))
    assert "has no hypernetwork; install lidb-peft from its wheel, or pass --hypernet none" in hdb.fail(
        "personalize", "me.jpg", "--hypernet", "testbed"
    )


@pytest.mark.parametrize(
    ("network", "arguments", "text"),
    [
        ("other", (), "another list of 8 layers"),
        (
            "net",
            ("--token", "sks"),
            "for the prompt 'a [V] face' with the token 'ohwx', not for 'a [V] face' with 'sks'",
        ),
        ("net", ("--prompt", "a photo of [V]"), "leave --prompt and --token out"),
        ("learned", ("--save-theta", "theta.safetensors"), "leave --save-theta out, for the LoRA holds everything"),
    ],
)
def test_what_does_not_go_with_a_hypernetwork_is_told(hdb, run, saved, network, arguments, text):
    assert text in hdb.fail(*run("--hypernet", saved / network, *arguments))


def test_two_starts_are_a_usage_error(hdb, run, saved):
    message = hdb.fail(*run("--hypernet", saved / "net", "--from-theta", "theta.safetensors"), code=2)
    assert "--hypernet and --from-theta contradict each other" in message


def test_damage_is_told_before_the_base_is_loaded(hdb, saved, portrait):
    shutil.copytree(saved / "net", "net")
    weights = Path("net/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    Path("empty").mkdir()
    personalize = ("personalize", portrait, "--no-crop", "--base", "no/such-base", "--hypernet")
    assert "net/model.safetensors is truncated" in hdb.fail(*personalize, "net")
    assert "empty is not a hypernetwork: it has no config.json" in hdb.fail(*personalize, "empty")
    assert "vae holds a model of type None" in hdb.fail(*personalize, miniature_path() / "vae")
    assert "is a file; name the folder" in hdb.fail(*personalize, portrait)
