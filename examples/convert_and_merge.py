"""Convert a LoRA file, add another and merge both into a model: python convert_and_merge.py FIRST SECOND MODEL.

The LoRAs may be in any format; MODEL is a diffusers folder or a .safetensors checkpoint that they fit. `hdb convert`
and `hdb merge` do the same; nothing is overwritten.
"""

import sys
from pathlib import Path

from converters import describe, merge, merge_into, prepare_conversion, prepare_writing, read_lora

first, second, model = sys.argv[1:]
conversion = prepare_conversion(first, "first-diffusers.safetensors", to="diffusers")
print(f"{first} is in the format {conversion.found}", *conversion.notes, *conversion.write(), sep="\n")

both, _ = merge([(read_lora(first), 0.8), (read_lora(second), 0.5)])  # exact: the ranks add up
prepare_writing(both, [first, second], "both.safetensors", to="kohya").write()
print(f"ranks of both together: {describe('both.safetensors').ranks}")

merge_into(model, both, "merged" + Path(model).suffix)  # one weight in memory at a time
