"""Rank relaxation: a plain LoRA of rank r > 1 trained on top of a frozen theta.

HyperDreamBooth (arXiv:2307.06949), section 4.3. The paper adds theta to the weights first; here theta stays an unmerged
factor, which is the same in exact arithmetic, because merging a small update into bf16 weights rounds most of it away.
For the same reason both parts leave as one LoRA by concatenation, never by an SVD.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .families import DENOISERS
from .layer import LiDBLayer
from .naming import layer_name

# layer name -> (lora_A (r, in), lora_B (out, r)), float32, every scale folded into lora_B: delta W = lora_B @ lora_A
LoraFactors = dict[str, tuple[Tensor, Tensor]]

THETA_ADAPTER = "theta"
RELAXED_ADAPTER = "relaxed"


def relax(
    model: nn.Module,
    factors: LoraFactors,
    rank: int,
    component: str = DENOISERS[0],
    merge: bool = False,
    generator: torch.Generator | None = None,
) -> PeftModel:
    """Put theta, frozen and exact, and a fresh trainable LoRA on the same layers of a base model, in place.

    Args:
        model: the base model of ``component``, without adapters.
        factors: theta's LoRA factors, as ``LiDBSpace.factors`` and ``peft_factors`` give them; those of other
            components are left out.
        rank: rank of the fresh LoRA: ``lora_A`` Kaiming-uniform, ``lora_B`` zero, so nothing changes yet.
        component: what the pipeline calls the model.
        merge: add theta to the weights, which become float32, instead of keeping it beside them.
        generator: draws ``lora_A``; the global one if None.

    Returns:
        the PEFT model. Adapter "relaxed" is the trainable one; "theta", unless merged, is active and frozen.

    Raises:
        ValueError: the rank is below 1, the model has adapters already, or a layer is missing or of another shape.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; choose 1 or more")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already has adapters; pass the base model (PEFT's unload() gives it back)")
    own = _own_factors(model, factors, component)
    if merge:
        model.float()
        with torch.no_grad():
            for name, (lora_A, lora_B) in own.items():
                weight = _weight(model.get_submodule(name))
                weight.addmm_(lora_B.to(weight), lora_A.to(weight))
    relaxed = get_peft_model(model, _lora_config(rank, own), adapter_name=RELAXED_ADAPTER)
    if generator is not None:
        _draw_lora_a(relaxed, generator)
    if not merge:
        _add_frozen_theta(relaxed, own)
    return relaxed


def _own_factors(model: nn.Module, factors: LoraFactors, component: str) -> LoraFactors:
    """Return the component's factors by module path, checked against the model's linear layers."""
    modules = {layer_name(component, n): (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = [name for name in factors if name.startswith(f"{component}.")]
    missing = [name for name in names if name not in modules]
    if missing or not names:
        raise ValueError(f"the factors do not fit this {component}: {len(names)} of its layers, missing {missing}")
    ranks = {factors[name][0].shape[0] for name in names}
    if len(ranks) > 1:
        raise ValueError(f"the factors have ranks {sorted(ranks)}; pass factors of one rank")
    own = {}
    for name in names:
        path, module = modules[name]
        lora_A, lora_B = (factor.detach().float() for factor in factors[name])
        if lora_A.shape[1:] != (module.in_features,) or lora_B.shape[:1] != (module.out_features,):
            raise ValueError(
                f"the factors of {name} have shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}; the layer "
                f"maps {module.in_features} to {module.out_features}"
            )
        own[path] = (lora_A, lora_B)
    return own


def _lora_config(rank: int, own: LoraFactors, inference_mode: bool = False) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(own), inference_mode=inference_mode)


@torch.no_grad()
def _draw_lora_a(model: PeftModel, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = _weight(module.lora_A[RELAXED_ADAPTER])
            drawn = torch.rand(weight.shape, generator=generator, device=generator.device)
            weight.copy_((2 * drawn - 1) * weight.shape[1] ** -0.5)  # PEFT's Kaiming-uniform with a = sqrt(5)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor), type(weight)
    return weight


def _add_frozen_theta(model: PeftModel, own: LoraFactors) -> None:
    rank = next(iter(own.values()))[0].shape[0]
    model.add_adapter(THETA_ADAPTER, _lora_config(rank, own, inference_mode=True))
    with torch.no_grad():
        for path, (lora_A, lora_B) in own.items():
            layer = model.get_base_model().get_submodule(path)
            assert isinstance(layer, LoraLayer), path
            _weight(layer.lora_A[THETA_ADAPTER]).copy_(lora_A)
            _weight(layer.lora_B[THETA_ADAPTER]).copy_(lora_B)
            # PEFT makes every active adapter trainable whenever it switches adapters, except what is listed here.
            layer.frozen_peft_weight_names = {THETA_ADAPTER: ("lora_A", "lora_B")}
    tuner = model.base_model
    assert isinstance(tuner, BaseTuner)
    tuner.set_adapter([RELAXED_ADAPTER, THETA_ADAPTER])


def peft_factors(model: nn.Module, component: str, adapter_name: str = "default") -> LoraFactors:
    """Return the LoRA factors of a LiDB or LoRA adapter that PEFT has put on ``model``, scales folded in.

    Raises:
        ValueError: there is no such adapter, or it is not a plain low-rank update (DoRA, embeddings, convolutions).
    """
    factors: LoraFactors = {}
    for name, module in model.named_modules():
        if isinstance(module, LiDBLayer) and adapter_name in module.lidb_keys:
            lora_A, lora_B = module.get_lora_factors(adapter_name)
            factors[layer_name(component, name)] = (lora_A.detach(), lora_B.detach())
        elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            if not isinstance(module.get_base_layer(), nn.Linear) or module.use_dora.get(adapter_name):
                raise ValueError(f"adapter {adapter_name!r} on {name} is not a plain low-rank update of a linear layer")
            lora_A, lora_B = _weight(module.lora_A[adapter_name]), _weight(module.lora_B[adapter_name])
            scaled = lora_B.detach().float() * module.scaling[adapter_name]
            factors[layer_name(component, name)] = (lora_A.detach().float(), scaled)
    if not factors:
        raise ValueError(f"the {component} has no LiDB or LoRA adapter called {adapter_name!r}")
    return factors


def combine(theta_factors: LoraFactors, lora_factors: LoraFactors) -> LoraFactors:
    """Return the sum of two updates as one LoRA whose rank is the sum of theirs; exact, no SVD.

    Written with alpha equal to that rank it needs no other scale. A batch axis in front is kept.

    Raises:
        ValueError: the two are not on the same layers, or a layer's shapes differ.
    """
    if set(theta_factors) != set(lora_factors):
        only_theta = sorted(set(theta_factors) - set(lora_factors))
        only_lora = sorted(set(lora_factors) - set(theta_factors))
        raise ValueError(f"the updates are on different layers: only theta on {only_theta}, only LoRA on {only_lora}")
    combined = {}
    for name, (theta_A, theta_B) in theta_factors.items():
        lora_A, lora_B = lora_factors[name]
        if theta_A.shape[-1] != lora_A.shape[-1] or theta_B.shape[-2] != lora_B.shape[-2]:
            raise ValueError(
                f"the updates of {name} map {theta_A.shape[-1]} to {theta_B.shape[-2]} and {lora_A.shape[-1]} to "
                f"{lora_B.shape[-2]}; take both from one base model"
            )
        combined[name] = (torch.cat([theta_A, lora_A], dim=-2), torch.cat([theta_B, lora_B], dim=-1))
    return combined
