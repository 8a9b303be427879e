"""Several layers and adapters: patterns, selections, weighted sums, bases from outside, compiling, DDP."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch._dynamo.testing import CompileCounter

from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.layer import LiDBLayer


class Blocks(nn.Module):
    """Three blocks of two layers, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(12, 12), "k": nn.Linear(12, 12)}) for _ in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block["q"](x)) * torch.sigmoid(block["k"](x))
        return self.head(x)


@pytest.fixture
def blocks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Blocks().eval()


@pytest.fixture
def x():
    return random(5, 12)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(**changes):
    return LiDBConfig(**({"target_modules": ["q", "k"], "down_dim": 8, "up_dim": 6} | changes))


@torch.no_grad()
def fill(model, adapter="default", seed=0):
    """Give an adapter values that change the output."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if name.endswith(f".{adapter}") and "lidb_" in name:
            parameter.copy_(0.5 * random(*parameter.shape, seed=100 * seed + index))
    return model


def layers_of(model, adapter="default"):
    """Return the layers that have the adapter, by name in the base model."""
    found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LiDBLayer)}
    return {name: layer for name, layer in found.items() if adapter in layer.lidb_down}


def test_patterns_give_layers_their_own_rank_and_scale_also_after_loading(blocks, x, tmp_path):
    patterns = {"rank_pattern": {"blocks.1.q": 3, "k": 2}, "scale_pattern": {r"blocks\.[02]\.q": 0.5}}
    model = fill(get_peft_model(copy.deepcopy(blocks), config(**patterns)))
    layers = layers_of(model)
    assert {name: layer.lidb_r["default"] for name, layer in layers.items()} == {
        "blocks.0.q": 1, "blocks.1.q": 3, "blocks.2.q": 1, "blocks.0.k": 2, "blocks.1.k": 2, "blocks.2.k": 2
    }  # fmt: skip
    assert layers["blocks.1.q"].lidb_down["default"].shape == (3, 8)
    assert [layers[f"blocks.{i}.q"].lidb_scaling["default"] for i in range(3)] == [0.5, 1.0, 0.5]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(blocks), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="rank is 7 but the bases have 8 and 6 vectors"):
        config(rank_pattern={"q": 7})
    with pytest.raises(ValueError, match="theta has one rank and scale for all layers"):
        LiDBSpace({"unet": blocks}, config(**patterns))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"exclude_modules": ["k"]}, {"blocks.0.q", "blocks.1.q", "blocks.2.q"}),
        ({"exclude_modules": r"blocks\.[01]\..*"}, {"blocks.2.q", "blocks.2.k"}),
        (
            {"layers_to_transform": [0, 2], "layers_pattern": "blocks", "exclude_modules": ["k"]},
            {"blocks.0.q", "blocks.2.q"},
        ),
        ({"layers_to_transform": 1, "layers_pattern": "blocks"}, {"blocks.1.q", "blocks.1.k"}),
        ({"target_modules": r".*\.2\.q|head"}, {"blocks.2.q", "head"}),
    ],
)
def test_layers_are_selected_as_in_peft(blocks, selection, expected):
    assert set(layers_of(get_peft_model(blocks, config(**selection)))) == expected


def test_a_weighted_sum_is_exact_for_any_ranks_scales_and_layers(blocks, x, tmp_path):
    model = fill(get_peft_model(copy.deepcopy(blocks), config(r=2, scale=0.5)))
    model.add_adapter("other", config(rank_pattern={"blocks.0.q": 3}, target_modules=["q", "head"]))
    fill(model, "other", seed=1)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "sum")
    deltas = {}
    for name, layer in layers_of(model, "sum").items():
        parts = [
            w * layer.get_delta_weight(p).double() for p, w in (("default", 0.7), ("other", -1.5)) if p in layer.lidb_r
        ]
        deltas[name] = sum(parts)
        assert torch.allclose(layer.get_delta_weight("sum").double(), deltas[name], atol=1e-6)
        assert not layer.lidb_up["sum"].requires_grad
    assert set(deltas) == set(layers_of(model)) | {"head"}
    assert {n: layer.lidb_r["sum"] for n, layer in layers_of(model, "sum").items() if "1" not in n} == {
        "blocks.0.q": 5, "blocks.2.q": 3, "blocks.0.k": 2, "blocks.2.k": 2, "head": 1
    }  # fmt: skip
    for name, delta in deltas.items():
        blocks.get_submodule(name).weight.data += delta.float()
    model.set_adapter("sum")
    assert torch.allclose(model(x), blocks(x), atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Blocks().eval(), tmp_path / "sum")
    assert torch.equal(loaded(x), model(x))


def test_a_sum_that_is_not_exact_is_refused(blocks):
    model = get_peft_model(blocks, config(r=4, modules_to_save=["head"]))
    model.add_adapter("seeded", config(seed=1))
    model.add_adapter("wide", config(r=3))
    with pytest.raises(ValueError, match=r"have different bases on blocks\.0\.q; add adapters of one seed"):
        model.add_weighted_adapter(["default", "seeded"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="rank is 7 but the bases have 8 and 6 vectors"):
        model.add_weighted_adapter(["default", "wide"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match=r"\['default', 'typo'\] cannot be added as 'sum'"):
        model.add_weighted_adapter(["default", "typo"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="there are 1 weights for 2 adapters; pass one for each"):
        model.add_weighted_adapter(["default", "wide"], [1.0], "sum")
    assert "sum" not in model.peft_config


def test_an_adapter_may_be_named_twice_in_a_sum(blocks):
    model = fill(get_peft_model(blocks, config()))
    model.add_weighted_adapter(["default", "default"], [1.0, 0.5], "sum")
    for layer in layers_of(model, "sum").values():
        assert torch.allclose(layer.get_delta_weight("sum"), 1.5 * layer.get_delta_weight("default"), atol=1e-6)


def test_a_whole_module_goes_into_the_sum_as_it_is(blocks):
    model = get_peft_model(blocks, config(modules_to_save=["head"]))
    model.add_adapter("other", config())
    with torch.no_grad():
        blocks.head.modules_to_save["default"].weight.fill_(0.25)
    model.add_weighted_adapter(["default", "other"], [2.0, 1.0], "sum")
    assert torch.equal(blocks.head.modules_to_save["sum"].weight, torch.full((4, 12), 0.25))
    with pytest.raises(ValueError, match="train the same whole module, which has no sum"):
        model.add_weighted_adapter(["default", "sum"], [1.0, 1.0], "more")


def test_bases_from_outside_are_used_and_stored(blocks, x, tmp_path):
    model = fill(get_peft_model(copy.deepcopy(blocks), config()))
    bases = {"down:12:8": random(8, 12, seed=5), "up:12:6": random(12, 6, seed=6)}
    model.base_model.use_bases(bases)
    layer = layers_of(model)["blocks.0.q"]
    dense = bases["up:12:6"] @ layer.lidb_up["default"] @ layer.lidb_down["default"] @ bases["down:12:8"]
    assert torch.allclose(layer.get_delta_weight("default"), dense, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(blocks), tmp_path)
    assert torch.equal(loaded(x), model(x))
    downs = {layer.lidb_aux["default"][0].data_ptr() for layer in layers_of(loaded).values()}
    assert len(downs) == 1
    frozen = fill(get_peft_model(copy.deepcopy(blocks), config()), seed=2)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(frozen))
    assert torch.equal(loaded(x), frozen(x))
    with pytest.raises(ValueError, match=r"there is no basis for \['up:12:6'\]"):
        model.base_model.use_bases({"down:12:8": bases["down:12:8"]})
    with pytest.raises(ValueError, match=r"has shape \(12, 8\); expected \(8, 12\)"):
        model.base_model.use_bases(bases | {"down:12:8": bases["down:12:8"].T})


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_it_is_injected_and_its_state_carried_over(blocks, x, low_cpu_mem_usage):
    source = fill(get_peft_model(copy.deepcopy(blocks), config()))
    state = get_peft_model_state_dict(source)
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    inject_adapter_in_model(config(), blocks, low_cpu_mem_usage=low_cpu_mem_usage)
    outcome = set_peft_model_state_dict(blocks, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not outcome.unexpected_keys
    assert torch.equal(blocks(x), source(x))


def test_hot_swapping_is_refused_and_loading_in_place_recompiles_nothing(blocks, x, tmp_path):
    other = fill(get_peft_model(copy.deepcopy(blocks), config()), seed=3)
    other.save_pretrained(tmp_path)
    model = fill(get_peft_model(blocks, config()))
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LIDB was passed"):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first = compiled(x)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.allclose(compiled(x), other(x), atol=1e-6)
    assert not torch.allclose(first, other(x), atol=1e-3)
    assert counter.frame_count == 1


def test_it_compiles_without_graph_breaks_after_loading_adding_and_moving(blocks, x, tmp_path):
    model = fill(get_peft_model(copy.deepcopy(blocks), config(lidb_dropout=0.5)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(blocks, tmp_path, low_cpu_mem_usage=True)
    loaded.add_adapter("other", config(seed=3))
    fill(loaded, "other", seed=1)

    def check():
        torch._dynamo.reset()
        compiled = torch.compile(loaded, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x.to(blocks.head.weight)), loaded(x.to(blocks.head.weight)), atol=1e-5)

    check()
    loaded.base_model.set_adapter(["default", "other"])
    check()
    loaded.to(torch.float64)
    check()


def test_gradients_pass_through_ddp(blocks, x, tmp_path):
    """DDP of one process: its hooks, buckets and check for unused parameters are those of many."""
    model = fill(get_peft_model(blocks, config()))
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a second step raises if a parameter had no part in the first
            model.zero_grad()
            parallel(x).square().sum().backward()
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def test_adapter_names_of_one_thread_reach_no_other(blocks, x):
    """PEFT hands them over by hooks of the modules, which other threads' calls run too."""
    model = get_peft_model(blocks, config(init_weights=False), adapter_name="one")
    model.add_adapter("two", config(init_weights=False))
    model.eval()
    names = [["one"] * len(x), ["two"] * len(x), ["__base__"] * len(x), None]

    @torch.no_grad()
    def call(number):
        own = names[number % len(names)]
        return model(x) if own is None else model(x, adapter_names=own)

    alone = [call(number) for number in range(len(names))]
    assert not torch.allclose(alone[0], alone[1])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(80)))
    assert all(torch.equal(result, alone[number % len(names)]) for number, result in enumerate(results))
