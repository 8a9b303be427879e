"""Shapes against those of the real models' modules."""

import pytest
import torch

from converters.layer import LoraLayer
from converters.lora import Lora
from converters.shapes import fit_shapes, kernel_side
from lidb_peft.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_a_real_model_is_known_as_what_it_is(real_models, family):
    if family not in ("sd1", "sd2", "sdxl"):
        pytest.skip("the fixture has no model of it")
    for component, model in real_models(family).items():
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                side = module.kernel_size[0] if isinstance(module, torch.nn.Conv2d) else 0
                assert kernel_side(f"{component}.{path}", family) == side, path


def test_kohya_trains_stable_diffusion_2_with_convolutions_around_attentions():
    name = "unet.mid_block.attentions.0.proj_in"
    assert [kernel_side(name, family) for family in ("sd1", "sd2", "sdxl", "")] == [1, 0, 0, None]
    assert [kernel_side(name, family, for_kohya=True) for family in ("sd1", "sd2", "sdxl")] == [1, 1, 0]


@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize(("family", "expected"), [("sd1", 4), ("sd2", 2), ("sdxl", 2), ("", None)])
def test_factors_get_the_dimensions_of_the_familys_layer_and_keep_their_numbers(dims, family, expected):
    tail = (1, 1) if dims == 4 else ()
    layer = LoraLayer(torch.randn(2, 8, *tail), torch.randn(6, 2, *tail), 1.0, torch.rand(6))
    found = fit_shapes(Lora({"unet.mid_block.attentions.0.proj_in": layer}, family))
    (fitted,) = found.layers.values()
    assert fitted.lora_A.dim() == fitted.lora_B.dim() == (expected or dims)
    assert torch.equal(fitted.lora_A.flatten(), layer.lora_A.flatten())
    assert torch.equal(fitted.lora_B.flatten(), layer.lora_B.flatten())
    assert fitted.magnitude is layer.magnitude


def test_a_flattened_kernel_is_a_kernel_again_and_a_kernel_on_a_linear_layer_is_refused():
    kernel = torch.randn(2, 8, 3, 3)
    layer = LoraLayer(kernel.flatten(1), torch.randn(6, 2), 1.0)
    found = fit_shapes(Lora({"unet.mid_block.resnets.0.conv1": layer}, "sd1"))
    assert torch.equal(found.layers["unet.mid_block.resnets.0.conv1"].lora_A, kernel)
    wrong = LoraLayer(kernel, torch.randn(6, 2, 1, 1), 1.0)
    with pytest.raises(ValueError, match="has a kernel of 3 x 3, but is linear in this family"):
        fit_shapes(Lora({"unet.mid_block.attentions.0.proj_in": wrong}, "sdxl"))
