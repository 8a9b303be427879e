"""What a kohya LoRA file does to each layer, read without the code that wrote it."""

import json
import struct

import numpy as np


def raw_deltas(path):
    """Kohya name -> alpha / rank * up @ down in float64, by json, struct and numpy alone."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        kind = {"F16": "<f2", "F32": "<f4"}[entry["dtype"]]
        arrays[name] = np.frombuffer(blob[start:end], kind).reshape(entry["shape"]).astype(np.float64)
    names = {name.partition(".")[0] for name in arrays}
    return {
        name: arrays[f"{name}.alpha"]
        / len(arrays[f"{name}.lora_down.weight"])
        * arrays[f"{name}.lora_up.weight"]
        @ arrays[f"{name}.lora_down.weight"]
        for name in names
    }


def kohya_name(layer):
    component, path = layer.split(".", 1)
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + path.replace(".", "_")


def assert_same_deltas(path, factors, tolerance, floor=0.0):
    """Every module's delta in the file is the factors', within a share of its norm, or ``floor`` where it is tiny."""
    deltas = raw_deltas(path)
    assert deltas.keys() == {kohya_name(layer) for layer in factors}
    for layer, (lora_A, lora_B) in factors.items():
        expected = (lora_B.double() @ lora_A.double()).numpy()
        error = np.linalg.norm(deltas[kohya_name(layer)] - expected)
        assert error <= tolerance * np.linalg.norm(expected) + floor, layer
