"""From a folder of photos to a trained hypernetwork, a LoRA in two formats, and a picture: python first_steps.py FACES.

The bundled miniature is the base here, so that it runs offline on a CPU, and `crop` is off because its people are
drawn. For another base, pass its id, folder or file, photos of people, and no `crop`, `hypernet="testbed"` or `steps`.
"""

import sys

from hypernet import generate, load_base, personalize, train
from lidb_peft import load_theta

if len(sys.argv) != 2:
    sys.exit("usage: python first_steps.py FACES, a folder with photos of people, one file each")
faces = sys.argv[1]
base = load_base("testbed")
trained = train(faces, "hypernetwork", base, hypernet="testbed", steps=2, crop=False, num_workers=0, batch_size=2)
me = personalize(f"{faces}/0.png", base, hypernet=trained.folder, steps=2, crop=False)
me.save("me.safetensors")  # for Automatic1111, ComfyUI, kohya and diffusers
me.save("me-peft", to="peft")  # for PeftModel.from_pretrained
generate(base, me.config.trigger, lora="me.safetensors", num_steps=2)[0].save("me.png")

alone = personalize(f"{faces}/0.png", base, hypernet="none", theta_steps=2, steps=2, crop=False)
alone.save_theta("theta.safetensors")  # the LiDB weights themselves
print(me, load_theta("theta.safetensors").theta.shape, sep="\n")
