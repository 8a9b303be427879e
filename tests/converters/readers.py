"""Other programs' readers of LoRA files, each in a few lines and with none of our code.

Written from what sd-scripts, Automatic1111 and ComfyUI were seen to do. Arrays are float64; a reader returns its own
name of a layer -> ``(out, in * kernel)``, and leaves out what it does not know, as the programs do.
"""

import json
import struct

import numpy as np

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def read_file(path):
    """``({name: float64 array}, metadata)`` of a safetensors file."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    metadata, arrays = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(blob[start:end], "<u2").astype("<u4") << 16).view("<f4")
        else:
            array = np.frombuffer(blob[start:end], _DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"]).astype(np.float64)
    return arrays, metadata


def flat(array):
    return array.reshape(len(array), -1)


def kohya(arrays, modules):
    """sd-scripts: ``modules`` are its names -> shapes of weights, whose dimensions the factors must have."""
    found = {}
    for name, shape in modules.items():
        down, up = (arrays.get(f"{name}.lora_{side}.weight") for side in ("down", "up"))
        if down is None:
            continue
        assert down.ndim == up.ndim == len(shape), f"{name}: size mismatch"
        alpha = arrays.get(f"{name}.alpha", np.array(float(len(down))))
        assert alpha.shape == (), f"{name}: size mismatch of alpha"
        found[name] = (float(alpha) or len(down)) / len(down) * flat(up) @ flat(down)
    return found


def a1111(arrays, modules):
    """Automatic1111: names up to the first dot; it reshapes factors to what the module is; alpha of its own module."""
    found = {}
    for key in arrays:
        name = key.partition(".")[0]
        if name in modules and f"{name}.lora_up.weight" in arrays and f"{name}.lora_down.weight" in arrays:
            down, up = arrays[f"{name}.lora_down.weight"], arrays[f"{name}.lora_up.weight"]
            scale = float(arrays[f"{name}.alpha"]) / len(down) if f"{name}.alpha" in arrays else 1.0
            update = flat(up) @ flat(down)
            assert update.size == np.prod(modules[name]), f"{name}: cannot be reshaped"
            found[name] = scale * update
    return found


def comfyui(arrays, key_map, shapes):
    """ComfyUI: ``key_map`` is its table of LoRA names -> weights of the model, tried with every spelling of factors."""
    spellings = (("{}.lora_up.weight", "{}.lora_down.weight"), ("{}_lora.up.weight", "{}_lora.down.weight"),
                 ("{}.lora_B.weight", "{}.lora_A.weight"), ("{}.lora.up.weight", "{}.lora.down.weight"),
                 ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"))  # fmt: skip
    found = {}
    for name, weight in key_map.items():
        up_name, down_name = next(((up.format(name), down.format(name)) for up, down in spellings
                                   if up.format(name) in arrays), ("", ""))  # fmt: skip
        if up_name:
            up, down = arrays[up_name], arrays[down_name]
            scale = float(arrays[f"{name}.alpha"]) / len(down) if f"{name}.alpha" in arrays else 1.0
            found[weight] = (scale * flat(up) @ flat(down)).reshape(shapes[weight]).reshape(shapes[weight][0], -1)
    return found


def comfyui_key_map(sgm_of, text_encoders):
    """ComfyUI's names of what it can patch.

    Args:
        sgm_of: diffusers' path of a UNet's module -> the first authors'; the model has the latter.
        text_encoders: ComfyUI's name of an encoder (``clip_l``) -> (its kohya prefixes, paths of its modules).
    """
    key_map = {}
    for path, sgm in sgm_of.items():
        weight = f"diffusion_model.{sgm}.weight"
        key_map[f"lora_unet_{sgm.replace('.', '_')}"] = weight
        key_map[f"diffusion_model.{sgm}"] = weight
        key_map[f"lora_unet_{path.replace('.', '_')}"] = weight
        key_map[f"lycoris_{path.replace('.', '_')}"] = weight
        old = path.replace(".to_", ".processor.to_").removesuffix(".0" if path.endswith("to_out.0") else "\0")
        key_map[old] = key_map[f"unet.{old}"] = weight
    for name, (prefixes, component, paths) in text_encoders.items():
        for path in paths:
            weight = f"{name}.transformer.{path}.weight"
            for prefix in prefixes:
                key_map[f"{prefix}{path.replace('.', '_')}"] = weight
            key_map[f"{component}.{path}"] = key_map[f"text_encoders.{name}.transformer.{path}"] = weight
    return key_map
