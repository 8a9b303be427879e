"""CUDA graphs, as far as they can be tested without CUDA: a capture of addresses, replayed kernel by kernel."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hypernet.fitting import engine
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.fitting.replay import WARM_UP, Replay
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.photos import Photo
from hypernet.recipe import FitConfig
from lidb_peft import LiDBSpace

CONFIG = FitConfig(steps=4, lr=1e-2, timesteps_per_step=2, background=0.5, preservation=1.0)
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Recording(TorchDispatchMode):
    """Keeps every kernel with the tensors that it reads and writes, as a CUDA graph keeps their addresses."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITING, f"{function} waits for the device, which a capture cannot"
        result = function(*args, **(kwargs or {}))
        self.kernels.append((function, *tree_map(_address, (args, kwargs or {}, result))))
        return result

    def replay(self):
        for function, args, kwargs, result in self.kernels:
            again = function(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Watching(TorchDispatchMode):
    """Notes the kernels that read or write tensors of another device than meta."""

    def __init__(self):
        super().__init__()
        self.kernels, self.elsewhere = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.kernels += 1
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.elsewhere.append(str(function))
        return result


def _address(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


class Emulated(Replay):
    """Replays on the CPU what the call after the warm-up recorded."""

    recording = None

    def _run(self, function):
        if self._calls <= WARM_UP:
            return super()._run(function)
        if self.recording is None:
            self.recording = Recording()
            with self.recording:
                self._result = function()
        else:
            with torch.no_grad():
                self.recording.replay()
        return self._result


@pytest.fixture
def fused(monkeypatch):
    """The optimiser as it is on CUDA: it waits for nothing, and its learning rate is a tensor."""

    def make_adamw(name, parameters, lr, capturable, **options):
        assert capturable
        return torch.optim.AdamW(parameters, lr=torch.tensor(lr), fused=True, **options)

    monkeypatch.setattr(engine, "make_adamw", make_adamw)


@pytest.fixture
def people(new_subject):
    return [replace(new_subject(key, photos), class_prompt="a face") for key, photos in (("ann", 2), ("bob", 1))]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("preservation", [0.0, 1.0])
def test_a_replayed_fit_equals_a_fit_step_by_step(base, space, people, preservation, monkeypatch):
    config = replace(CONFIG, steps=WARM_UP + 3, preservation=preservation)
    theta, losses = fit_theta(base, space, people, config)
    loras, lora_losses = fit_lora(base, space, people, config, 2, theta)
    monkeypatch.setattr(engine, "Replay", Emulated)
    replayed, replayed_losses = fit_theta(base, space, people, config)
    assert torch.equal(replayed, theta)
    assert torch.equal(replayed_losses, losses)
    replayed_loras, replayed_losses = fit_lora(base, space, people, config, 2, theta)
    assert torch.equal(replayed_losses, lora_losses)
    for lora, expected in zip(replayed_loras, loras, strict=True):
        assert all(torch.equal(lora[name][side], expected[name][side]) for name in expected for side in (0, 1))


@pytest.fixture
def captures(monkeypatch):
    """The replays that are made, each of which captures once."""
    made = []

    class Counted(Emulated):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(engine, "Replay", Counted)
    return made


@pytest.mark.usefixtures("fused")
def test_a_kept_step_is_replayed_for_the_next_people_as_if_captured_for_them(base, space, new_subject, captures):
    """Their photos, noise, theta and first LoRA are in it, and nothing of the people before."""
    config = replace(CONFIG, steps=WARM_UP + 2, timesteps_per_step=1)
    subjects = [[new_subject(f"a{batch}", 2), new_subject(f"b{batch}", 1)] for batch in range(2)]
    batches = [[replace(subject, class_prompt="a face") for subject in own] for own in subjects]
    thetas = [space.theta_0 + 0.1 * batch * space.mask for batch in range(2)]
    kept = engine.KeptStep()
    for batch, (people, theta) in enumerate(zip(batches, thetas, strict=True)):
        own = replace(config, seed=batch, lr=1e-2 / (1 + batch), steps=config.steps + batch)
        found, losses = fit_lora(base, space, people, own, 2, theta, kept=kept)
        expected, expected_losses = fit_lora(base, space, people, own, 2, theta)
        assert torch.equal(losses, expected_losses)
        for lora, right in zip(found, expected, strict=True):
            assert all(torch.equal(lora[name][side], right[name][side]) for name in right for side in (0, 1))
    assert len(captures) == 1 + len(batches)


@pytest.mark.usefixtures("fused")
def test_a_step_is_made_anew_where_the_kept_one_does_not_fit(base, space, people, new_subject, captures):
    config, kept = replace(CONFIG, steps=1, preservation=0.0), engine.KeptStep()
    fit_theta(base, space, people, config, kept=kept)
    fit_theta(base, space, people, config, kept=kept)
    assert len(captures) == 1
    fit_theta(base, space, people[:1], config, kept=kept)  # fewer
    fit_theta(base, space, people[:1], replace(config, background=1.0), kept=kept)
    fit_theta(base, space, [replace(people[0], prompt="a sks man")], replace(config, background=1.0), kept=kept)
    assert len(captures) == 4
    weight = next(base.unet.parameters())
    before = weight.data
    weight.data = before.clone()  # as when photos were encoded in the place of the models
    fit_theta(base, space, [replace(people[0], prompt="a sks man")], replace(config, background=1.0), kept=kept)
    weight.data = before
    assert len(captures) == 5
    kept.release()
    assert kept.step is None


def test_a_kept_step_makes_room_for_photos_that_do_not_fit_beside_it(base, space, people, monkeypatch):
    kept, encode, asked = engine.KeptStep(), base.encode_photos, []
    fit_theta(base, space, people, replace(CONFIG, steps=1, preservation=0.0), kept=kept)

    def full(pixels):
        asked.append(kept.step is None)
        if kept.step is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(base, "encode_photos", full)
    photo = Photo(Image.new("RGB", (32, 32)), "me.png")
    (subject,) = make_subjects(base, [PreparedPerson("me", (photo,))], "a sks face", kept=kept)
    assert asked == [False, True]
    assert torch.equal(subject.moments, encode(photo.to_tensor()[None]))


def test_a_kept_step_forgets_a_fit_that_was_not_finite(base, space, people):
    kept, failed = engine.KeptStep(), {}
    config = replace(CONFIG, preservation=0.0)
    broken = replace(people[0], moments=torch.full_like(people[0].moments, float("nan")))
    fit_theta(base, space, [broken, people[1]], config, failed=failed, kept=kept)
    assert list(failed) == [0]
    theta, _ = fit_theta(base, space, people, config, kept=kept)
    assert torch.equal(theta, fit_theta(base, space, people, config)[0])


def test_a_step_reads_nothing_that_is_not_on_the_device(base, space, people):
    """A copy from the CPU waits for the device, and a capture refuses it; meta tensors stand for a device here."""
    meta = replace(base, **{name: copy.deepcopy(model).to("meta") for name, model in base.adapted.items()})
    meta_space = LiDBSpace(meta.adapted, space.config)
    theta = space.theta_0.expand(2, -1, -1).to("meta")
    fit = engine._Fit(meta, meta_space, people, CONFIG, engine._Trained(theta, meta_space.expand))
    step = engine._Step(fit)
    step.steps_inside = False  # AdamW itself counts its steps on the CPU unless it is on CUDA
    step(1e-3)
    with Watching() as watching:
        step._compute()
    assert watching.kernels > 1000
    assert watching.elsewhere == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without CUDA")
def test_a_graph_that_cannot_be_had_is_refused(base, space, people):
    with pytest.raises(ValueError, match="a CUDA graph was asked for on cpu"):
        fit_theta(base, space, people, replace(CONFIG, graph="on"))


def test_a_fit_that_is_over_leaves_nothing_to_the_garbage_collector(base, space, people, monkeypatch):
    """Or the memory of its graph would still be there when the next batch of people needs it."""
    steps, original = [], engine._Step

    def note(*arguments):
        step = original(*arguments)
        steps.append(weakref.ref(step))
        return step

    monkeypatch.setattr(engine, "_Step", note)
    gc.disable()
    try:
        fit_theta(base, space, people, CONFIG)
    finally:
        gc.enable()
    assert [step() for step in steps] == [None]


class FailingCapture:
    """Stands for `torch.cuda.graph`, which raises what the step raises in it."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.mark.parametrize("sentence", ["CUDA out of memory. Tried to allocate 2 GiB", "operation not permitted"])
def test_a_capture_that_fails_lets_go_of_what_the_step_held(monkeypatch, sentence):
    """Its activations are gone at once, and not when the garbage collector comes by."""
    released, held = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    monkeypatch.setattr(torch.cuda, "stream", FailingCapture)
    monkeypatch.setattr("hypernet.fitting.replay.release_memory", released.append)
    replay = Replay(torch.device("cpu"), "off")
    replay.mode, replay._captures, replay._calls = "auto", True, WARM_UP

    def step():
        activations = torch.ones(1000)
        if replay._captures:
            held.append(weakref.ref(activations))
            raise RuntimeError(sentence)
        return activations[:1]

    gc.disable()
    try:
        with pytest.warns(UserWarning, match=rf"cannot be captured in a CUDA graph \({sentence.split('.')[0]}"):
            assert replay(step) == 1
        assert [reference() for reference in held] == [None]
    finally:
        gc.enable()
    assert released == [torch.device("cpu")]
    assert replay.graph is None
    assert replay(step) == 1


def runs_out_of_memory(sentence, calls, monkeypatch):
    """Let steps without checkpointing of two people or more run out of memory."""
    original = engine._optimize

    def optimize(fit, recomputes, *others):
        calls.append((len(fit.subjects), recomputes))
        if not recomputes and len(fit.subjects) > 1:
            raise RuntimeError(sentence)
        return original(fit, recomputes, *others)

    monkeypatch.setattr(engine, "_optimize", optimize)
    monkeypatch.setattr(engine, "_too_large", weakref.WeakKeyDictionary())


@pytest.mark.usefixtures("checkpointing")
def test_a_step_that_does_not_fit_is_checkpointed_and_that_is_remembered(base, space, people, monkeypatch):
    calls: list = []
    runs_out_of_memory("MPS backend out of memory (MPS allocated: 8 GB)", calls, monkeypatch)
    with pytest.warns(UserWarning, match="gradient checkpointing is on now"):
        theta, _ = fit_theta(base, space, people, CONFIG)
    again, _ = fit_theta(base, space, people, CONFIG)
    fit_theta(base, space, people[:1], CONFIG)
    assert calls == [(2, False), (2, True), (2, True), (1, False)]
    assert torch.equal(theta, again)


def test_another_error_of_a_step_is_not_taken_for_want_of_memory(base, space, people, monkeypatch):
    calls: list = []
    runs_out_of_memory("CUDA error: device-side assert triggered", calls, monkeypatch)
    with pytest.raises(RuntimeError, match="device-side assert"):
        fit_theta(base, space, people, CONFIG)
    assert calls == [(2, False)]
