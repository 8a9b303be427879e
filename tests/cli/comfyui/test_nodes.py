"""ComfyUI's nodes under stand-ins for ComfyUI."""

import json
import os

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from cli.comfyui.command import PACK
from cli.main import main

NAMES = ["LidbPersonalize", "LidbPredict", "LidbLoad", "LidbSheet"]


def personalize(nodes, photos, **options):
    node = {"checkpoint": "testbed", "other_base": "", "name": "me", "steps": 2, "seed": 0, "find_face": False,
            "preview_every": 0, "weight": 0.8}  # fmt: skip
    with torch.inference_mode():  # as ComfyUI runs nodes
        return nodes["LidbPersonalize"].execute(photos, **node | options).result


def test_comfyui_gets_four_nodes_whose_inputs_are_arguments(nodes):
    assert list(nodes) == NAMES
    for node in nodes.values():
        schema = node.define_schema()
        arguments = node.execute.__func__.__code__.co_varnames[1 : node.execute.__func__.__code__.co_argcount]
        assert sorted(socket.id for socket in schema.inputs) == sorted(arguments)
        ids = [socket.id for socket in (*schema.inputs, *schema.outputs)]
        assert len(set(ids)) == len(ids)
        defaults = len(node.execute.__func__.__defaults__ or ())
        optional = [socket.id for socket in schema.inputs if socket.options.get("optional")]
        assert list(arguments[len(arguments) - defaults :]) == optional
        # ComfyUI lists optional inputs behind all others, and workflows hold the values of widgets in its order.
        assert [socket.id for socket in schema.inputs][len(schema.inputs) - defaults :] == optional


def test_photos_become_a_lora_file_and_patched_models(nodes, comfy, photos):
    plain, plain_clip = comfy.load_checkpoint()
    model, clip, name, trigger, faces = personalize(nodes, photos, model=plain, clip=plain_clip)
    assert name == "me.safetensors"
    assert trigger == "a sks face"
    layers = {key.partition(".")[0] for key in safe_open(comfy.loras / name, "pt").keys()}  # noqa: SIM118
    assert set(model.patches) | set(clip.patcher.patches) == layers
    assert {strength for patches in model.patches.values() for strength, _ in patches} == {0.8}
    assert plain.patches == plain_clip.patcher.patches == {}
    assert faces.shape == (1, 32, 32, 3)
    assert 0 <= faces.min() <= faces.max() <= 1
    assert comfy.progress == [(1, 2), (2, 2)]
    assert comfy.unloaded == 1
    assert comfy.previews == 0
    assert personalize(nodes, photos, preview_every=1)[:3] == (None, None, "me-2.safetensors")
    assert comfy.previews >= 1


@pytest.mark.parametrize("settings", [{"block_out_channels": (32, 32)}, {"cross_attention_dim": 24}])
def test_a_model_of_another_base_is_an_error_and_does_not_come_out_unchanged(nodes, comfy, photos, settings):
    narrow = {"block_out_channels": (64, 64), "cross_attention_dim": 32, "norm_num_groups": 8, "attention_head_dim": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    model, _ = comfy.load_checkpoint()
    model.model = UNet2DConditionModel(**blocks, **narrow | settings)
    with pytest.raises(ValueError, match=r"is of another size .* connect those of the checkpoint that it was made for"):
        personalize(nodes, photos, model=model)
    model.model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no layer of the LoRA is in .* connect those of the checkpoint"):
        personalize(nodes, photos, model=model)


def test_errors_name_inputs_of_the_node_and_no_options_of_the_command_line(nodes, comfy):
    grey = torch.full((1, 64, 64, 3), 0.5)
    with pytest.raises(ValueError, match=r"no face found.* turn find_face off"):
        personalize(nodes, grey, find_face=True)
    with pytest.raises(ValueError, match="pass other_base with a diffusers folder"):
        personalize(nodes, grey, other_base="/nowhere/base")


def test_cancel_ends_it_and_leaves_no_file(nodes, comfy, photos):
    comfy.is_cancelled = True
    with pytest.raises(comfy.interrupted):
        personalize(nodes, photos, steps=500)
    assert comfy.files("loras") == []


def test_each_photo_of_a_batch_is_predicted(nodes, comfy, photos):
    with torch.inference_mode():
        names, trigger = (
            nodes["LidbPredict"]
            .execute(torch.cat([photos, photos.flip(2)]), "testbed", "", "testbed", "predicted", False)
            .result
        )
    assert names == ["predicted.safetensors", "predicted-2.safetensors"]
    assert comfy.files("loras") == sorted([*names, "predicted.json", "predicted-2.json"])
    first, second = (safe_open(comfy.loras / name, "pt") for name in names)
    assert any(not torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys())  # noqa: SIM118
    assert trigger
    assert comfy.progress[-1] == (2, 2)


def test_lidb_weights_are_put_on_a_model(nodes, comfy, portrait):
    from hypernet import personalize

    result = personalize(portrait, "testbed", hypernet=None, start=None, theta_steps=1, steps=0, crop=False)
    result.save_theta(comfy.loras / "theta.safetensors")
    with torch.inference_mode():
        model, clip = (
            nodes["LidbLoad"].execute("theta.safetensors", "testbed", 1.0, model=comfy.load_checkpoint()[0]).result
        )
    assert clip is None
    expected = {f"lora_{name.replace('.', '_')}": factors for name, factors in result.theta_factors.items()}
    assert model.patches
    for name, ((strength, patch),) in model.patches.items():
        lora_A, lora_B = expected[name]
        update = patch["alpha"] / len(patch["lora_down.weight"]) * patch["lora_up.weight"] @ patch["lora_down.weight"]
        assert strength == 1.0
        torch.testing.assert_close(update.float(), lora_B @ lora_A, rtol=0.01, atol=1e-5)


def test_a_sheet_of_loras_and_weights_is_a_picture(nodes, comfy, photos):
    *_, name, _, _ = personalize(nodes, photos)
    with torch.inference_mode():
        (sheet,) = nodes["LidbSheet"].execute("testbed", "", name, "a sks face", "0.5, 1", 2, 0).result
    assert sheet.ndim == 4
    assert sheet.shape[2] > 2 * 192
    with pytest.raises(ValueError, match="write the names of some in models/loras"):
        nodes["LidbSheet"].execute("testbed", "", " ", "a sks face", "1", 2, 0)
    with pytest.raises(ValueError, match="write numbers, such as"):
        nodes["LidbSheet"].execute("testbed", "", name, "a sks face", "strong", 2, 0)
    comfy.is_cancelled = True
    with pytest.raises(comfy.interrupted):
        nodes["LidbSheet"].execute("testbed", "", name, "a sks face", "1", 2, 0)


def test_a_checkpoint_of_comfyui_is_taken_by_its_file(nodes, comfy, photos):
    (comfy.checkpoints / "broken.safetensors").write_bytes(b"no checkpoint")
    (choice,) = [one for one in nodes["LidbPersonalize"].define_schema().inputs if one.id == "checkpoint"]
    assert choice.options["options"] == ["broken.safetensors", "testbed"]
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        personalize(nodes, photos, checkpoint="broken.safetensors")


@pytest.mark.parametrize("file", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_the_example_workflows_fit_the_nodes(nodes, file):
    workflow = json.loads(file.read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Lidb")]
    assert ours
    for node in ours:
        schema = nodes[node["type"]].define_schema()
        sockets = [one for one in schema.inputs if one.io_type in ("IMAGE", "MODEL", "CLIP")]
        widgets = [one for one in schema.inputs if one not in sockets]
        assert [(one["name"], one["type"]) for one in node["inputs"]] == [(one.id, one.io_type) for one in sockets]
        # Beside a seed ComfyUI shows what becomes of it after each run.
        seeds = sum(one.id == "seed" for one in widgets)
        assert len(node["widgets_values"]) == len(widgets) + seeds
        assert [one["type"] for one in node["outputs"]] == [one.io_type for one in schema.outputs]
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in by_id[source]["outputs"][output]["links"]
        assert by_id[source]["outputs"][output]["type"] == by_id[target]["inputs"][slot]["type"] == kind
        assert by_id[target]["inputs"][slot]["link"] == number


@pytest.mark.parametrize("options", [(), ("--copy",)])
def test_hdb_puts_the_nodes_into_comfyui_and_takes_them_out(tmp_path, options):
    run = CliRunner().invoke
    assert "is not a folder of ComfyUI" in run(main, ["comfyui", "install", str(tmp_path)]).output
    place = tmp_path / "custom_nodes" / "lidb-peft"
    place.parent.mkdir()
    assert run(main, ["comfyui", "install", str(tmp_path), *options]).exit_code == 0
    assert place.is_symlink() != bool(options)
    assert (place / "nodes.py").read_text() == (PACK / "nodes.py").read_text()
    assert "uninstall it first" in run(main, ["comfyui", "install", str(tmp_path)]).output
    assert run(main, ["comfyui", "uninstall", str(tmp_path)]).exit_code == 0
    assert not os.path.lexists(place)
    assert (PACK / "nodes.py").is_file()
    assert "nothing is installed" in run(main, ["comfyui", "uninstall", str(tmp_path)]).output
