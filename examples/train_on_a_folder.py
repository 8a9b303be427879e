"""Train a hypernetwork on a folder of people and use it on somebody new: python train_on_a_folder.py PEOPLE PHOTO.

PEOPLE holds one photo of each person, or a sub-folder of photos of each. The bundled miniature is the base, and
training starts from its own hypernetwork, so that this takes seconds on a CPU. For another base, leave out
`hypernet="testbed"` and `crop`, and train for thousands of steps.
"""

import sys

from hypernet import generate, load_base, personalize, train

people, photo = sys.argv[1:]
base = load_base("testbed")
trained = train(
    people, "hypernetwork", base, hypernet="testbed", steps=4, batch_size=2, validation=0.34, crop=False, num_workers=0
)
print(f"{trained.steps} steps, loss {trained.loss:.3f}; the best on people it was not trained on: {trained.best:.3f}")

predicted = personalize(photo, base, hypernet=trained.folder, steps=0, crop=False)  # the prediction, not finetuned
predicted.save("predicted.safetensors")
generate(base, predicted.config.trigger, lora="predicted.safetensors", num_steps=4)[0].save("predicted.png")
