"""A hypernetwork's ``config.json`` from anywhere, checked before anything is built, contacted or printed.

What is not listed is refused: transformers would fetch a backbone or attention kernels that a config names, or make a
million labels of a number. Every size is bounded, and all of them together by the weights that are there.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from lidb_peft.record import read_number
from lidb_peft.safe_read import printable

ENCODERS = (
    "vit", "deit", "clip_vision_model", "siglip_vision_model", "dinov2",
    "dinov2_with_registers", "dinov3_vit", "ijepa", "beit", "data2vec-vision", "vit_msn",
)  # fmt: skip
"""Model types, as transformers calls them, of vision transformers that read square pictures."""
# They have transformers fetch, install or run something.
_FORBIDDEN = frozenset(
    {"attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config", "auto_map",
     "backbone", "backbone_config", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone",
     "trust_remote_code", "custom_pipelines", "kernel_config", "compression_config"}
)  # fmt: skip
# How settings were called -> how they are.
EARLIER_NAMES = {"rounds": "k"}
# What saving adds to our own settings.
_SAVED = frozenset({"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"})
# What transformers 4 and 5 save of any model, which says nothing of an encoder's architecture.
_OF_ANY_MODEL = frozenset(
    {"id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "return_dict", "finetuning_task",
     "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
     "tie_word_embeddings", "tie_encoder_decoder", "is_decoder", "is_encoder_decoder", "cross_attention_hidden_size",
     "add_cross_attention", "chunk_size_feed_forward", "tokenizer_class", "prefix", "bos_token_id", "pad_token_id",
     "eos_token_id", "sep_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample",
     "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
     "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
     "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
     "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
     "begin_suppress_tokens", "projection_dim", "logit_scale_init_value"}
)  # fmt: skip
_LARGEST = {
    "k": 64, "hidden_size": 16_384, "num_hidden_layers": 200, "num_attention_heads": 256, "image_size": 4096,
    "patch_size": 4096, "num_channels": 16, "intermediate_size": 65_536, "mlp_ratio": 64, "num_register_tokens": 1024,
}  # fmt: skip
_LARGEST_COUNT = 65_536  # of what is not listed
_SHARES = ("_prob", "_rate", "dropout")  # endings of settings from 0 to 1
_MAX_TEXT_CHARS, _MAX_LIST = 500, 5000
_RECORD_CHARS = 1_000_000
_DTYPES = ("float32", "float16", "bfloat16")
_REMEDY = "get it from somebody you trust, or train one with hdb train"


def todays_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says, under the names that settings have today."""
    return {EARLIER_NAMES.get(name, name): value for name, value in found.items()}


def check_config(source: str, found: Mapping[str, Any], own: type) -> None:
    """Check what a ``config.json`` says of a hypernetwork, under `todays_names`.

    Args:
        own: the config class, whose arguments are the settings.

    Raises:
        ValueError: a setting that is not known, or of another type or size than can be; the message names it.
    """
    where = f"the config.json of {source}"
    settings = inspect.signature(own.__init__).parameters  # type: ignore[misc]  # of a class, not of an object
    _refuse_unknown(where, found, known={*settings, *_SAVED} - {"self", "kwargs"})
    for name in ("dtype", "torch_dtype"):
        if found.get(name) not in (None, *_DTYPES):
            raise _refused(where, name, found[name])
    for name, parameter in settings.items():
        if name in found and name not in ("self", "kwargs", "encoder", "layers", "record", "image_mean", "image_std"):
            is_free = parameter.default is None and found[name] is None
            if not is_free:
                _check_value(where, name, found[name], 1 if parameter.default is None else parameter.default)
    for name in ("image_mean", "image_std"):
        values = found.get(name, [1.0] * 3)
        is_good = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
        if not is_good or (name == "image_std" and not all(values)):
            raise _refused(where, name, values)
    _check_layers(where, found.get("layers"))
    _check_record(where, found.get("record"))
    if not isinstance(found.get("encoder"), dict):
        raise _refused(where, "encoder", found.get("encoder"))
    _check_encoder(where, found["encoder"])


def encoder_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Make the config of a vision transformer from those of its settings that describe its architecture.

    Raises:
        ValueError: the model type is not one of ``ENCODERS``, or a setting cannot be.
    """
    _check_encoder("the config of the encoder", settings)
    kind = settings["model_type"]
    return AutoConfig.for_model(kind, **{name: settings[name] for name in _architecture(kind) if name in settings})


def check_size(source: str, config: PretrainedConfig, num_stored: int) -> None:
    """Raise ValueError if the config describes far more numbers than the ``num_stored`` that the weights have."""
    encoder, where = config.encoder, f"the config.json of {source}"
    a, b, r = (read_number(config.record, name, int, where) for name in ("down_dim", "up_dim", "r"))
    widest = max(max(shape) for shape in config.shapes)
    row = r * (min(a, widest) + min(b, widest))
    inner = getattr(encoder, "intermediate_size", None) or getattr(encoder, "mlp_ratio", 4) * encoder.hidden_size
    described = (
        len(config.layers) * config.hidden_size * row
        + config.num_hidden_layers * 12 * config.hidden_size**2
        + encoder.num_hidden_layers * encoder.hidden_size * (4 * encoder.hidden_size + 2 * inner)
    )
    if described > 2 * num_stored + 100_000:
        raise ValueError(f"{where} describes {described:,.0f} numbers or more and {num_stored:,} are there; {_REMEDY}")


def _architecture(kind: str) -> dict[str, Any]:
    """The settings that a model type has of its own, with their defaults."""
    own, all_models = AutoConfig.for_model(kind).to_dict(), PretrainedConfig().to_dict()
    return {name: value for name, value in own.items() if name not in all_models and not name.startswith("_")}


def _check_encoder(where: str, found: Mapping[str, Any]) -> None:
    kind = found.get("model_type")
    if kind not in ENCODERS:
        raise ValueError(f"{where} names an encoder of type {_shown(kind)}; choose a vision transformer: ViT, CLIP, "
                         f"SigLIP or DINOv2")  # fmt: skip
    try:
        architecture = _architecture(kind)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} names an encoder of type {kind}, which the installed transformers lacks; update "
                         f"it") from error  # fmt: skip
    named = {name for name in found if not name.startswith("_") or name in _FORBIDDEN}
    known = {*architecture, *PretrainedConfig().to_dict(), *_OF_ANY_MODEL, *_SAVED}
    _refuse_unknown(where, dict.fromkeys(named), known)
    for name, default in architecture.items():
        if name in found:
            _check_value(f"{where}: encoder", name, found[name], default)
    size, patch, width, heads = (
        found.get(name, architecture.get(name))
        for name in ("image_size", "patch_size", "hidden_size", "num_attention_heads")
    )
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size <= 128 * patch:
        raise ValueError(f"{where} has pictures of {_shown(size)} in patches of {_shown(patch)} pixels; {_REMEDY}")
    if not width or not heads or width % heads:
        raise ValueError(f"{where} has an encoder of hidden_size {width} with {heads} attention heads; {_REMEDY}")


def _check_value(where: str, name: str, value: Any, default: Any) -> None:
    """Check one value against the type of its default, and against what can be."""
    if isinstance(default, bool):
        is_good = isinstance(value, bool)
    elif isinstance(default, int | float):
        largest = _LARGEST.get(name, _LARGEST_COUNT)
        has_fractions = isinstance(default, float) or name.endswith(_SHARES) or name == "mlp_ratio"
        is_good = _is_number(value) and abs(value) <= largest and (has_fractions or isinstance(value, int))
        is_good = is_good and (value >= 0 if name not in _LARGEST or name == "num_register_tokens" else value >= 1)
        is_good = is_good and (not name.endswith(_SHARES) or value < 1)
    elif isinstance(default, str):
        is_good = isinstance(value, str) and value.isprintable() and len(value) <= _MAX_TEXT_CHARS
        is_good = is_good and (not name.endswith("_act") or value in ACT2FN)
    elif isinstance(default, list | tuple):
        is_good = isinstance(value, list) and len(value) <= _MAX_LIST
        is_good = is_good and all(
            _is_number(item) or (isinstance(item, str) and item.isprintable() and len(item) <= 99) for item in value
        )
    else:  # None stands for what follows from the others
        is_good = value is None or (_is_number(value) and 0 <= value <= _LARGEST.get(name, _LARGEST_COUNT))
    if not is_good:
        raise _refused(where, name, value)


def _check_layers(where: str, layers: Any) -> None:
    if not isinstance(layers, list) or not 0 < len(layers) <= _MAX_LIST:
        raise _refused(where, "layers", layers)
    for layer in layers:
        is_good = isinstance(layer, list) and len(layer) == 3 and isinstance(layer[0], str)
        is_good = is_good and layer[0].isprintable() and len(layer[0]) <= _MAX_TEXT_CHARS
        if not is_good or not all(type(width) is int and 0 < width <= _LARGEST_COUNT for width in layer[1:]):
            raise _refused(where, "layers", layer)
    if len({layer[0] for layer in layers}) < len(layers):
        raise ValueError(f"{where} lists a layer twice; {_REMEDY}")


def _check_record(where: str, record: Any) -> None:
    if not isinstance(record, dict):
        raise _refused(where, "record", record)
    for name, value in record.items():
        if not isinstance(value, str) or not value.isprintable() or len(value) > _RECORD_CHARS:
            raise _refused(where, f"record {printable(name)}", value)


def _refuse_unknown(where: str, found: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(name for name in found if name in _FORBIDDEN or name not in known)
    if unknown:
        raise ValueError(f"{where} has {printable(', '.join(unknown))}, which no hypernetwork has; {_REMEDY}")


def _refused(where: str, name: str, value: Any) -> ValueError:
    return ValueError(f"{where} says {name} is {_shown(value)}, which cannot be; {_REMEDY}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    return printable(repr(value))
