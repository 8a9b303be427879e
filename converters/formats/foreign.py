"""Identifying a file that is not a LoRA of a known family: the model it is for, or what else it is."""

import re
from collections.abc import Iterable, Mapping
from itertools import islice

from converters.formats.family import stated_base
from lidb_peft.families import FAMILIES
from lidb_peft.safe_read import printable

_MAX_SHOWN = 3

# Patterns of tensor names, whatever their prefix and separators -> the model; the first match counts.
_ADAPTERS = (
    (r"single_transformer_blocks|double_blocks.*(img|txt)_(attn_(qkv|proj)|mlp_|mod_)|double_blocks.*_attn\.qkv"
     r"|single_blocks.*(linear1|linear2|modulation)", "FLUX"),
    (r"joint_transformer_blocks", "AuraFlow"),
    (r"joint_blocks|transformer_blocks.*(add_[qkv]_proj|to_add_out|norm1_context|ff_context)",
     "Stable Diffusion 3 or another model with its transformer"),
    (r"double_stream_blocks", "HiDream"),
    (r"lora_prior_|down_blocks\.\d+\.\d+\.(attention|kv_mapper)", "Stable Cascade"),
    (r"adaln_single|caption_projection|lora_transformer_transformer_blocks.*attn2", "PixArt, LTX-Video or Sana"),
    (r"blocks.*(cross_attn|self_attn)[._](q|k|v|o)\b|blocks.*(cross_attn|self_attn)_(q|k|v|o)$", "Wan"),
    (r"double_blocks.*(img|txt)_attn_(q|k|v)\b", "HunyuanVideo"),
    (r"(noise|context)_refiner|layers.*attention[._](qkv|to_q|out)\b", "Lumina or Z-Image"),
    (r"temporal_transformer_blocks|temporal_attentions|motion_modules", "a video model such as AnimateDiff"),
    (r"control_model|controlnet|input_hint_block|lora_controlnet", "ControlNet"),
    (r"(^|\.)model[._]layers[._]\d+[._](self_attn|mlp)[._](q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
     "a language model"),
    (r"encoder[._]block[._]\d+[._]layer|lora_te3_", "a text encoder of T5's kind (Stable Diffusion 3, FLUX)"),
    (r"vision_model", "an image encoder"),
    (r"^(transformer|lora_transformer)[._]", "a diffusion transformer"),
)  # fmt: skip
_HAS_FACTORS = re.compile(r"lora_(A|B|down|up)\b|lora[._](down|up)\b|lora_linear_layer|hada_|lokr_|\.alpha$")
# Prefix of names -> what the file is, and what to do.
_OTHERS = (
    (r"model\.diffusion_model\.", "a whole model, not an adapter: hdb merge --into adds LoRAs to it"),
    (r"(diffusion_model\.)?(input_blocks|double_blocks|joint_blocks)\.\d+\.|down_blocks\.\d+\.resnets|conv_in\.weight",
     "a model's UNet or transformer, not an adapter: hdb merge --into takes a whole model"),
    (r"first_stage_model\.|(encoder|decoder|quant_conv)\.", "a VAE, not an adapter"),
    (r"control_model\.|controlnet|input_hint_block", "a ControlNet, not an adapter"),
    (r"(text_model|transformer\.resblocks|cond_stage_model|conditioner)\.", "a text encoder, not an adapter"),
    (r"emb_params$|clip_[lg]$|string_to_param", "a textual inversion embedding, not a LoRA: it goes to the embeddings"),
    (r"ip_adapter\.|image_proj", "an IP-Adapter, not a LoRA"),
)  # fmt: skip
# Names may be long and many; only this much of them is searched.
_MAX_NAMES, _MAX_CHARS = 5000, 300


def name_foreign(names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Return what a file is, "a LoRA of FLUX", from the names of its tensors and its metadata.

    The text completes a sentence; for unknown content it lists the first names.
    """
    names = [name[:_MAX_CHARS] for name in islice(names, _MAX_NAMES)]
    shown = ", ".join(printable(name) for name in names[:_MAX_SHOWN]) or "no tensors"
    if not any(_HAS_FACTORS.search(name) for name in names):
        found = (what for pattern, what in _OTHERS if any(re.match(pattern, name) for name in names))
        return next(found, f"no adapter that is known here: it holds {shown}")
    stated = stated_base(metadata)
    models = [what for pattern, what in _ADAPTERS if any(re.search(pattern, name) for name in names)][:1]
    models += [printable(stated)] if stated and stated not in FAMILIES else []
    return f"a LoRA of {', '.join(models)}" if models else ""
