"""Training the hypernetwork: that it learns, is resumed exactly, and is shared between processes."""

import errno
import gc
import itertools
import json
import shutil
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig

import hypernet.training.loop as loop
import hypernet.training.setup as setup
import hypernet.training.validation as validation
import lidb_peft.sealed
from hypernet.fitting.targets import Shard, TargetStore, create_targets
from hypernet.inputs.people import Skipped, open_people, prepare_person, write_skipped
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import TrainConfig
from hypernet.training.loop import _read_skipped, train
from hypernet.training.objective import Objective
from hypernet.training.setup import make_optimizer
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.files import atomic_path
from lidb_peft.sealed import read_tree, write_tree

pytestmark = pytest.mark.usefixtures("datasets_cache")

ENCODER = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
)
CONFIG = TrainConfig(
    steps=6, lr=3e-3, warmup_steps=1, batch_size=2, denoising=0.0, target_distance=1.0, flip=True, validation=0.0,
    crop=False, log_every=1, checkpoint_every=2, num_workers=0,
)  # fmt: skip
DENOISING = replace(CONFIG, denoising=1.0, target_distance=0.0)
FIT = {"prompt": "a sks face", "crop": False, "size_px": 32}


def make_network(space, **options):
    decoder = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "k": 2}
    return HyperNetwork(HyperNetworkConfig.for_space(space, ENCODER, "mini", **decoder | options))


@pytest.fixture
def targets(space, face_folder):
    """A store of random targets for the five faces."""
    people = [prepare_person(person, 32, crop=False)[0] for person in open_people(face_folder)]
    names, keys = tuple(p.name for p in people), tuple(p.key for p in people)
    noise = torch.randn(5, *space.theta_0.shape, generator=torch.Generator().manual_seed(7))
    folder = face_folder.parent / "targets"
    create_targets(folder, space, "mini", FIT, 5, str(face_folder))
    shard = Shard(rows=names, keys=keys, names=names, skipped=())
    TargetStore(folder, space).write(0, shard, space.theta_0 + 0.3 * noise * space.mask, torch.zeros(5))
    return folder


@pytest.fixture
def run(base, space, face_folder, targets, tmp_path, monkeypatch):
    """A function: (name of a folder, config) -> (the folder, its network, what came of the training)."""
    monkeypatch.setattr(validation, "PICTURE_STEPS", 1)
    monkeypatch.setattr(validation, "PICTURED", 1)

    def train_into(name, config=CONFIG, network=None, people=None, **options):
        network = network or make_network(space)
        given = targets if config.target_distance else None
        options = {"targets": given, **options}
        result = train(people or open_people(face_folder), base, network, tmp_path / name, config, **options)
        return tmp_path / name, network, result

    return train_into


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder, which="last"):
    return load_file(folder / which / "model.safetensors")


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


def stop_at(step):
    def progress(stage, done, total):
        if done == step:
            raise KeyboardInterrupt

    return progress


# ---- what is learned ----


@pytest.mark.parametrize("compare", ["updates", "factors"])
def test_predictions_approach_the_targets(run, compare):
    config = replace(CONFIG, steps=40, batch_size=5, lr=1e-2, flip=False, compare=compare, checkpoint_every=40)
    folder, _, result = run("out", config)
    losses = [entry["loss"] for entry in log(folder)]
    assert losses[0] == pytest.approx(1.0, abs=0.05)  # theta_0's distance, by the normalisation
    assert losses[-1] < 0.9 * losses[0]
    assert (result.steps, result.loss, result.best) == (40, losses[-1], None)


def test_the_denoising_loss_alone_lowers_itself_on_the_same_noise(run):
    def measured(name, network):
        """The loss on the five faces at the noise of step 0; at this rate the network stays as it is."""
        config = replace(DENOISING, steps=1, lr=1e-12, batch_size=5, timesteps_per_step=4, flip=False)
        return run(name, config, network)[2].loss

    config = replace(DENOISING, steps=10, batch_size=4, lr=1e-2, flip=False, checkpoint_every=10)
    folder, network, _ = run("out", config)
    assert set(log(folder)[0]) == {"step", "loss", "denoising", "people", "lr"}
    saved = HyperNetwork.from_pretrained(folder / "last").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    assert measured("after", network) < measured("before", None)


def test_a_loss_that_rose_is_told_from_one_that_fell(run):
    folder, _, result = run("out", replace(CONFIG, steps=2))
    losses = [line["loss"] for line in log(folder)]
    assert (result.first_loss, result.loss) == (losses[0], losses[-1])
    assert loop.logged_loss(folder) == losses[-1]
    assert not replace(result, first_loss=1.0, loss=0.9).rose
    assert replace(result, first_loss=1.0, loss=1.1).rose


def test_learned_bases_are_trained_and_saved(run, space):
    network = make_network(space, learned_bases=True)
    before = {name: value.clone() for name, value in network.bases.items()}
    folder, _, _ = run("out", replace(CONFIG, steps=2), network)
    assert all((network.bases[name] != value).any() for name, value in before.items())
    loaded = HyperNetwork.from_pretrained(folder / "last")
    assert all(torch.equal(loaded.bases[name], network.bases[name]) for name in before)
    with pytest.raises(ValueError, match="'factors', which mean nothing on learned bases"):
        run("other", replace(CONFIG, compare="factors"), make_network(space, learned_bases=True))


def test_held_out_people_are_validated_on_and_the_best_is_kept(run):
    config = replace(CONFIG, steps=4, denoising=1.0, validation=0.4)
    folder, _, result = run("out", config)
    entries = [entry for entry in log(folder) if "validation_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(entry["validation_people"] == 2 for entry in entries)
    assert result.best == min(entry["validation_loss"] for entry in entries)
    for entry in entries:
        assert entry["validation_loss"] == pytest.approx(
            entry["validation_denoising"] + entry["validation_target_distance"]
        )
    assert sorted(file.name for file in (folder / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    best = min(entries, key=lambda entry: entry["validation_loss"])["step"]
    assert (largest_difference(weights(folder), weights(folder, "best")) == 0) == (best == 4)


def test_a_folder_of_held_out_people_needs_no_targets(run, face_folder):
    others = face_folder.parent / "others"
    others.mkdir()
    (others / "new.png").write_bytes((face_folder / "4.png").read_bytes())
    (face_folder / "4.png").unlink()
    config = replace(CONFIG, steps=1, denoising=1.0)
    folder, _, _ = run("out", config, held_out=open_people(others))
    (entry,) = (entry for entry in log(folder) if "validation_loss" in entry)
    assert set(entry) == {"step", "validation_loss", "validation_denoising", "validation_people"}
    with pytest.raises(ValueError, match="nothing could be measured on the held-out people"):
        run("more", CONFIG, held_out=open_people(others))


def test_held_out_people_are_looked_at_before_the_first_step(run, face_folder, tmp_path):
    others = face_folder.parent / "others"
    others.mkdir()
    (others / "new.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the people of .*others .*could be used \(new\.png: .*not an image"):
        run("out", replace(CONFIG, steps=1, denoising=1.0), held_out=open_people(others))
    assert not (tmp_path / "out" / "last").exists()


def test_validation_comes_after_the_checkpoint_and_never_ends_a_training(run, monkeypatch, tmp_path):
    config = replace(CONFIG, steps=2, denoising=1.0, validation=0.4)
    unbroken, _, _ = run("unbroken", config)

    def fail(*_):
        assert (tmp_path / "out" / "last").exists()
        raise RuntimeError("no memory for this. Try more")

    for name in ("draw_sheet", "validation_sums"):
        monkeypatch.setattr(loop, name, fail)
        with pytest.warns(
            UserWarning, match=r"step 2 is saved, but (not validated|its samples are not drawn): no memory for this"
        ):
            folder, _, result = run("out", config)
        assert result.steps == 2
        assert largest_difference(weights(folder), weights(unbroken)) == 0
        shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["validation_sums", "draw_sheet"])
def test_a_run_that_is_killed_after_its_checkpoint_validates_it_when_it_is_resumed(run, monkeypatch, place):
    config = replace(CONFIG, steps=4, denoising=1.0, validation=0.4)
    unbroken, _, expected = run("unbroken", config)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, place, stop)
        with pytest.raises(KeyboardInterrupt):
            run("out", config)
    folder = unbroken.parent / "out"
    folder, _, result = run("out", config, HyperNetwork.from_pretrained(folder / "last"), resume=True)
    assert (log(folder), result.best) == (log(unbroken), expected.best)
    for name in ("best", "last"):
        assert largest_difference(weights(folder, name), weights(unbroken, name)) == 0
    for sheet in (unbroken / "samples").iterdir():
        assert (folder / "samples" / sheet.name).read_bytes() == sheet.read_bytes()


def test_the_moving_average_is_saved_and_validated_and_the_steps_stay_as_they_are(run, space):
    config = replace(CONFIG, steps=5, denoising=1.0, validation=0.4, ema_decay=0.3)
    plain, _, _ = run("plain", replace(config, ema_decay=0.0))
    seen = []
    network = make_network(space)
    folder, network, _ = run("out", config, network, progress=lambda *_: seen.append(trainable(network)))
    average = seen[0]
    for step, after in enumerate(seen[1:], 1):
        kept = min(0.3, (1 + step) / (10 + step))  # diffusers' formula, with the decay that rises to its own
        average = {name: kept * average[name] + (1 - kept) * value for name, value in after.items()}
    last = weights(folder)
    assert all(torch.allclose(last[name].double(), value, atol=1e-7) for name, value in average.items())
    assert largest_difference({name: last[name] for name in average}, trainable(network)) == 0
    for one, other in zip(log(folder), log(plain), strict=True):
        assert one.get("loss") == other.get("loss")
    raw, theirs = (read_tree(place / "training.safetensors")["network"] for place in (folder, plain))
    assert largest_difference(raw, theirs) == 0
    assert largest_difference(raw, {name: last[name] for name in raw}) > 1e-6
    still = replace(config, steps=1, lr=1e-12, ema_decay=0.0)
    again, _, _ = run("again", still, HyperNetwork.from_pretrained(folder / "last"))
    assert log(again)[-1]["validation_loss"] == pytest.approx(log(folder)[-1]["validation_loss"], rel=1e-6)
    assert log(plain)[-1]["validation_loss"] != pytest.approx(log(folder)[-1]["validation_loss"], rel=1e-6)


def trainable(network):
    return {name: value.detach().double() for name, value in network.named_parameters() if value.requires_grad}


# ---- stopped, resumed, accumulated, shared ----


@pytest.mark.parametrize("stopped_at", [1, 3, 4])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run, stopped_at):
    config = replace(CONFIG, gradient_accumulation_steps=2, denoising=1.0 if stopped_at == 3 else 0.0,
                     ema_decay=0.9 if stopped_at == 3 else 0.0)  # fmt: skip
    unbroken, _, _ = run("unbroken", config)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", config, progress=stop_at(stopped_at))
    last = HyperNetwork.from_pretrained(unbroken.parent / "stopped" / "last")
    resumed, network, result = run("stopped", config, last, resume=True)
    assert result.steps == 6
    assert log(resumed) == log(unbroken)
    assert largest_difference(weights(resumed), weights(unbroken)) == 0
    assert torch.equal(network.heads.weight, weights(unbroken)["heads.weight"])


def test_a_run_killed_while_it_writes_leaves_a_whole_state(run, monkeypatch, tmp_path):
    def disk_full(path, tensors, metadata):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    with monkeypatch.context() as patch:
        saves = iter([lidb_peft.sealed.write_safetensors] * 2 + [disk_full])
        patch.setattr(lidb_peft.sealed, "write_safetensors", lambda *arguments: next(saves)(*arguments))
        with pytest.raises(OSError, match=r"No space left on device.*training\.safetensors"):
            run("out")
    network = HyperNetwork.from_pretrained(tmp_path / "out" / "last")
    resumed, _, _ = run("out", CONFIG, network, resume=True)
    unbroken, _, _ = run("unbroken")
    assert log(resumed) == log(unbroken)
    assert largest_difference(weights(resumed), weights(unbroken)) == 0


def but_key_biases(weights):
    """Attention's softmax does not see them: their gradients are rounding, of which Adam makes steps."""
    seen = {name: value.clone() for name, value in weights.items()}
    for name, value in seen.items():
        if name.endswith("in_proj_bias"):
            value.view(3, -1)[1] = 0
    return seen


def test_accumulated_passes_are_one_large_one(run):
    config = replace(CONFIG, steps=10, lr=1e-3, checkpoint_every=10)
    whole, _, _ = run("whole", replace(config, batch_size=4))
    parts, _, _ = run("parts", replace(config, gradient_accumulation_steps=2))
    assert largest_difference(but_key_biases(weights(whole)), but_key_biases(weights(parts))) < 1e-5
    for one, other in zip(log(whole), log(parts), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_workers_change_nothing(run):
    alone, _, _ = run("alone", replace(CONFIG, steps=2))
    helped, _, _ = run("helped", replace(CONFIG, steps=2, num_workers=1))
    assert log(helped) == log(alone)
    assert largest_difference(weights(alone), weights(helped)) == 0


SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from hypernet.base_models.loading import load_base
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.inputs.people import open_people
from hypernet.recipe import TrainConfig
from hypernet.training.loop import _read_skipped, train
from hypernet.training.objective import Objective
from testbed import miniature_path

def die(stage, done, total):
    if done == 4:
        os._exit(9)

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
base = load_base(str(miniature_path()), device="cpu", precision="fp32")
config = TrainConfig(**eval(sys.argv[3]))
try:
    train(open_people(folder / "faces"), base, HyperNetwork.from_pretrained(folder / "start"), out, config,
          folder / "targets", progress=die)
except ConnectionError as error:
    print("TOLD", error)
"""


def test_two_processes_train_as_one_in_two_passes_bit_for_bit_and_tell_when_the_other_dies(
    run, space, start_pair, tmp_path
):
    """Learned bases are used outside of the hypernetwork's own forward pass: their gradients are shared too. What is
    compared is the moving average, which each process has of its own."""
    make_network(space, learned_bases=True).save_pretrained(tmp_path / "start")
    config = replace(CONFIG, steps=5, lr=1e-3, denoising=0.5, batch_size=1, ema_decay=0.9)
    given = {name: value for name, value in vars(config).items() if name != "preserved"}
    pair = start_pair("-c", SCRIPT, tmp_path, tmp_path / "shared", given)
    start = HyperNetwork.from_pretrained(tmp_path / "start")
    with pytest.raises(KeyboardInterrupt):
        run("alone", replace(config, gradient_accumulation_steps=2), start, progress=stop_at(4))
    told = [process.communicate(timeout=300) for process in pair]
    assert largest_difference(weights(tmp_path / "alone"), weights(tmp_path / "shared")) == 0
    for one, other in zip(log(tmp_path / "alone"), log(tmp_path / "shared"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert [process.returncode for process in pair] == [9, 0], told
    assert "TOLD another process of this training has died or hangs" in told[1][0]


class FullPass(torch.nn.Module):
    """Stands for an objective whose backward pass does not fit into the memory."""

    base = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    config = SimpleNamespace(ema_decay=0.0)

    def __init__(self):
        super().__init__()
        self.network, self.losses = torch.nn.Linear(4, 4), []

    def forward(self, pixels):
        loss = self.network(pixels).sum()
        loss.register_hook(self.run_out)
        self.losses.append(weakref.ref(loss))
        return loss, None

    def run_out(self, gradient):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_pass_that_does_not_fit_lets_go_of_its_tensors_before_memory_is_released(monkeypatch):
    objective, left = FullPass(), []
    monkeypatch.setattr(setup, "release_memory", lambda device: left.extend(loss() for loss in objective.losses))
    gc.disable()
    try:
        assert not setup._fits(objective, torch.ones(1, 4))
    finally:
        gc.enable()
    assert left == [None]


# ---- bad input ----


def test_what_cannot_be_used_is_skipped_and_listed(run, face_folder):
    (face_folder / "new.png").write_bytes(b"no picture")
    (face_folder / "3.png").write_bytes(b"no picture any more")
    folder, _, result = run("out", replace(DENOISING, steps=2, batch_size=6, timesteps_per_step=1))
    assert set(result.skipped) == {"new.png", "3.png"}
    listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {entry["name"]: entry["reason"] for entry in listed} == result.skipped
    assert all(entry["people"] == 4 for entry in log(folder))


def test_any_name_of_what_was_skipped_is_read_back(tmp_path):
    names = {"a\u2028b.png": "no picture", "c\x85\n.png": "too small", "d\udcff.png": "no face"}
    write_skipped(tmp_path / "skipped.jsonl", itertools.starmap(Skipped, names.items()))
    assert _read_skipped(tmp_path / "skipped.jsonl") == names


def test_it_goes_on_past_those_who_cannot_be_used_unless_that_is_everybody(run, face_folder):
    for name in ("0.png", "1.png", "2.png"):
        (face_folder / name).write_bytes(b"no picture")
    config = replace(CONFIG, steps=5, batch_size=1, checkpoint_every=5)
    folder, _, _ = run("out", config)
    assert [entry["people"] for entry in log(folder)] == [1, 1]  # an epoch, a line for each step that had somebody
    for file in face_folder.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"none of the people of .*faces that were looked at could be used \(\d\.png: "
    ):
        run("other", config)


def test_targets_must_belong_to_these_people_this_base_and_this_prompt(run, base, space, targets, tmp_path):
    with pytest.raises(ValueError, match="prompt 'a sks face' \\(here 'a xyz face'\\)"):
        run("out", CONFIG, make_network(space, token="xyz"))
    with pytest.raises(ValueError, match="crop False \\(here True\\)"):
        run("out", replace(CONFIG, crop=True))
    other = LiDBSpace(base.adapted, replace_seed(space.config))
    with pytest.raises(ValueError, match="was made with seed"):
        run("out", CONFIG, make_network(other))
    with pytest.raises(ValueError, match="that term needs targets"):
        run("out", CONFIG, targets=None)
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    (tmp_path / "faces" / "0.png").rename(strangers / "stranger.png")
    with pytest.raises(ValueError, match=r"nobody in .*strangers has a target in .*targets, which was fitted on"):
        run("out", CONFIG, people=open_people(strangers))
    assert not (tmp_path / "out").exists()


def replace_seed(config: LiDBConfig) -> LiDBConfig:
    return LiDBConfig(r=config.r, down_dim=config.down_dim, up_dim=config.up_dim, scale=config.scale, seed=99)


def test_a_shard_of_targets_that_is_gone_is_named_and_people_without_one_are_counted(run, space, targets, tmp_path):
    store = TargetStore(targets, space)
    whole = store.read(0)
    keys = dict(zip(whole.names, whole.keys, strict=True))
    thetas = store.thetas(whole.keys)
    store.path(0).unlink()
    for index, rows in enumerate((whole.rows[:2], whole.rows[2:4], whole.rows[4:])):
        shard = Shard(rows=rows, keys=tuple(keys[name] for name in rows), names=rows, skipped=())
        store.write(index, shard, thetas[2 * index : 2 * index + len(rows)], torch.zeros(len(rows)))
    store.path(2).unlink()  # as if pre-optimisation was stopped
    with pytest.warns(UserWarning, match=r"1 of the 5 people in .*faces are in no shard of .*targets and are left out"):
        _, _, result = run("some", replace(CONFIG, steps=1))
    assert result.steps == 1
    store.path(0).unlink()
    with pytest.raises(ValueError, match=r"targets lacks 1 of its shards, shard-00000\.safetensors for one; run hdb"):
        run("none", replace(CONFIG, steps=1))
    assert not (tmp_path / "none").exists()


def test_resuming_needs_a_whole_state_of_the_same_training(run, space, tmp_path):
    with pytest.raises(FileNotFoundError, match="out holds no training to resume"):
        run("out", resume=True)
    short = replace(CONFIG, steps=2)
    run("out", short)
    with pytest.raises(ValueError, match="out holds a training already; resume it"):
        run("out", short)
    with pytest.raises(ValueError, match=r"lr 0\.003 \(here 0\.001\); resume with its own settings"):
        run("out", replace(short, lr=1e-3), resume=True)
    with pytest.raises(
        ValueError,
        match="trained on 2 people a step, and processes, batch_size and gradient_accumulation_steps make 3 now",
    ):
        run("out", replace(short, batch_size=3), resume=True)
    with pytest.raises(ValueError, match=r"is of another hypernetwork: \d+ of its weights"):
        run("out", short, make_network(space, hidden_size=16), resume=True)
    state = tmp_path / "out" / "training.safetensors"
    whole = state.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged, reason in ((whole[:-100], "is truncated"), (flipped, "its bytes are not those of its checksum")):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"training\.safetensors is damaged: {reason}.* --hypernet"):
            run("out", short, resume=True)
    state.rename(tmp_path / "out" / "training.pt")
    with pytest.raises(ValueError, match=r"training\.pt is a training state of format 1, a pickle.* --hypernet"):
        run("out", short, resume=True)


def test_a_state_with_the_earlier_names_of_settings_is_resumed(run, tmp_path):
    earlier = {"batch_size": "batch", "gradient_accumulation_steps": "accumulation", "lr_scheduler": "schedule",
               "num_workers": "workers", "target_distance": "weights"}  # fmt: skip
    run("out", replace(CONFIG, steps=6))
    state = read_tree(tmp_path / "out" / "training.safetensors")
    state["config"] = {earlier.get(name, name): value for name, value in state["config"].items()}
    state["config"]["gradient_checkpointing"] = False
    write_tree(tmp_path / "out" / "training.safetensors", state)
    network = HyperNetwork.from_pretrained(tmp_path / "out" / "last")
    assert run("out", CONFIG, network, resume=True)[2].steps == 6
    with pytest.raises(ValueError, match=r"with lr_scheduler 'cosine' \(here 'linear'\)"):
        run("out", replace(CONFIG, lr_scheduler="linear"), network, resume=True)


def test_checkpointing_is_turned_on_where_a_step_does_not_fit_and_changes_nothing(run, monkeypatch):
    config = replace(DENOISING, steps=2)
    expected = weights(run("off", replace(config, gradient_checkpointing="off"))[0])
    monkeypatch.setattr(setup, "_RUN_OUT", ("cpu",))
    modes, forward = [], Objective.forward

    def watched(self, batch):
        modes.append(self.network.gradient_checkpointing)
        if is_small and len(modes) == 1:
            raise MemoryError
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", watched)
    is_small = False
    assert largest_difference(weights(run("fits", config)[0]), expected) == 0
    assert not any(modes)
    is_small = True
    modes.clear()
    with pytest.warns(UserWarning, match="gradient checkpointing is on now") as told:
        folder, _, _ = run("small", config)
    assert len(told) == 1  # nothing of another library's
    assert largest_difference(weights(folder), expected) < 1e-6
    assert modes == [False, True, True]


def test_resuming_needs_the_same_people_photos_and_targets(run, space, face_folder, targets, tmp_path):
    config = replace(CONFIG, steps=1, denoising=1.0)
    run("out", config)
    photo = (face_folder / "2.png").read_bytes()
    Image.new("RGB", (64, 64)).save(face_folder / "2.png")
    with pytest.raises(ValueError, match=r"training\.safetensors was trained on other people than there are now"):
        run("out", config, resume=True)
    (face_folder / "2.png").write_bytes(photo)
    with pytest.raises(ValueError, match="other held-out people than there are now"):
        run("out", config, held_out=open_people(face_folder), resume=True)
    store = TargetStore(targets, space)
    shard = store.read(0)
    store.write(0, replace(shard, names=shard.names[:4], keys=shard.keys[:4]), store.thetas(shard.keys[:4]),
                torch.zeros(4))  # fmt: skip
    with pytest.raises(ValueError, match="other targets than there are now"):
        run("out", config, resume=True)


def test_a_divergence_stops_before_it_is_saved(run, tmp_path):
    with pytest.raises(ValueError, match=r"the training diverged before step .*lower the learning rate"):
        run("out", replace(CONFIG, lr=1e30, warmup_steps=0, steps=20))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())


def test_what_is_not_installed_is_named(run, space, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"adamw8bit requires bitsandbytes.*choose adamw"):
        make_optimizer(make_network(space), replace(CONFIG, optimizer="adamw8bit"))
    with pytest.raises(ValueError, match="the tracker 'abacus' is not installed"):
        run("out", trackers=["abacus"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoising": 0.0, "target_distance": 0.0}, "nothing would be learned"),
        ({"lr_scheduler": "step"}, "lr_scheduler is 'step'; choose cosine or linear"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"jitter": 1.0}, "jitter is 1.0; expected 0 or more and less than 1"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_a_config_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)
