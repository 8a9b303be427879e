"""The nodes: each is one call of the public API on what is connected to it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from comfy_api.latest import io

from . import running

_CATEGORY = "lidb-peft"
_CONSENT = " Make one only of yourself, or of somebody who has agreed to it."


def _base_inputs() -> list:
    return [
        io.Combo.Input("checkpoint", options=running.base_choices(), tooltip="The base model that is personalised."),
        io.String.Input("other_base", default="", tooltip="In its place: a Hugging Face id, or a diffusers folder."),
    ]  # fmt: skip


def _patched_inputs() -> list:
    """The last of a node's inputs: ComfyUI lists optional ones behind all others."""
    return [
        io.Float.Input("weight", default=1.0, min=-2.0, max=2.0, step=0.05, tooltip="Of the LoRA on model and clip."),
        io.Model.Input("model", optional=True, tooltip="Comes out with the LoRA on it."),
        io.Clip.Input("clip", optional=True, tooltip="Comes out with the LoRA on it."),
    ]


class LidbPersonalize(io.ComfyNode):
    """Photos of one person in, a LoRA file out, and the model with it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LidbPersonalize",
            display_name="Personalize (lidb-peft)",
            category=_CATEGORY,
            description="Makes a LoRA of the person in the photos, in models/loras." + _CONSENT,
            is_output_node=True,
            inputs=[
                io.Image.Input("photos", tooltip="One person; several photos are a batch."),
                *_base_inputs(),
                io.String.Input("name", default="me", tooltip="Of the LoRA's file; a number is added if it is taken."),
                io.Int.Input("steps", default=0, min=0, max=10_000, tooltip="0: as many as the base's recipe has."),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1),
                io.Boolean.Input("find_face", default=True, tooltip="Off: the middle square of each photo is taken."),
                io.Int.Input(
                    "preview_every",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Steps between pictures of the trigger prompt on this node; 0: none.",
                ),
                *_patched_inputs(),
            ],
            outputs=[
                io.Model.Output("out_model", display_name="model"),
                io.Clip.Output("out_clip", display_name="clip"),
                io.String.Output("lora_name", display_name="lora_name", tooltip="In models/loras."),
                io.String.Output("trigger", display_name="trigger", tooltip="The prompt that calls the person up."),
                io.Image.Output("faces", display_name="faces", tooltip="What was taken of the photos."),
            ],
        )

    @classmethod
    def execute(cls, photos, checkpoint, other_base, name, steps, seed, find_face, preview_every, weight,
                model=None, clip=None):  # fmt: skip
        from hypernet import personalize

        progress, options = running.Progress(), {"seed": seed, "crop": find_face} | ({"steps": steps} if steps else {})
        file = running.free_lora(name)
        with running.words_of_nodes(), running.own_memory():
            result = personalize(
                running.to_pictures(photos), running.chosen_base(other_base.strip() or checkpoint),
                preview_every=preview_every or None,
                on_step=lambda report: progress.show(report.step, report.steps, report.picture), **options,
            )  # fmt: skip
            result.save(file)
        faces = running.to_images([photo.image for photo in result.photos])
        return io.NodeOutput(*running.apply_lora(model, clip, file, weight), file.name, result.config.trigger, faces)


class LidbPredict(io.ComfyNode):
    """Each photo's LoRA, as a hypernetwork predicts it: no training."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LidbPredict",
            display_name="Predict LoRAs (lidb-peft)",
            category=_CATEGORY,
            description="Predicts a LoRA of each photo, each of a person of their own, in models/loras." + _CONSENT,
            is_output_node=True,
            inputs=[
                io.Image.Input("photos", tooltip="Each photo of the batch is a person."),
                *_base_inputs(),
                io.String.Input("hypernetwork", default=running.MINIATURE,
                                tooltip="A Hugging Face id, a folder of hdb train, or testbed, the miniature's."),
                io.String.Input("name", default="predicted", tooltip="Of the files; a number is added."),
                io.Boolean.Input("find_face", default=True, tooltip="Off: the middle square of each photo is taken."),
            ],
            outputs=[
                io.String.Output("lora_names", display_name="lora_name", is_output_list=True),
                io.String.Output("trigger", display_name="trigger"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, photos, checkpoint, other_base, hypernetwork, name, find_face):
        from hypernet import HyperNetwork, personalize
        from hypernet.base_models.loading import as_base

        progress, names, trigger = running.Progress(), [], ""
        with running.words_of_nodes(), running.own_memory():
            base = as_base(running.chosen_base(other_base.strip() or checkpoint))
            pictures = running.to_pictures(photos)
            network = hypernetwork if hypernetwork == running.MINIATURE else HyperNetwork.from_pretrained(hypernetwork)
            for number, photo in enumerate(pictures, 1):
                result = personalize(photo, base, hypernet=network, steps=0, crop=find_face)
                progress.show(number, len(pictures))
                file = running.free_lora(name)
                result.save(file)
                names.append(file.name)
                trigger = result.config.trigger
        return io.NodeOutput(names, trigger)


class LidbLoad(io.ComfyNode):
    """LiDB weights, which no other loader reads, on a model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LidbLoad",
            display_name="Load LiDB weights (lidb-peft)",
            category=_CATEGORY,
            description="Puts a theta file, or any other adapter that lidb-peft reads, on the model.",
            inputs=[
                io.Combo.Input("file", options=running.lora_choices(), tooltip="In models/loras."),
                io.String.Input("base", default="",
                                tooltip="The checkpoint, id or folder of its base, if that is of no known family."),
                *_patched_inputs(),
            ],
            outputs=[
                io.Model.Output("out_model", display_name="model"),
                io.Clip.Output("out_clip", display_name="clip"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, file, base, weight, model=None, clip=None):
        from converters import prepare_conversion
        from hypernet.base_models.loading import as_base

        with running.words_of_nodes(), TemporaryDirectory() as folder:
            opened = as_base(running.chosen_base(base.strip()), device="cpu") if base.strip() else None
            options = {"models": opened.adapted, "family": opened.family} if opened else {}
            lora = Path(folder) / "lora.safetensors"
            prepare_conversion(running.lora_file(file), lora, "kohya", **options).write()
            return io.NodeOutput(*running.apply_lora(model, clip, lora, weight))


class LidbSheet(io.ComfyNode):
    """LoRAs x weights x prompts on one picture, to choose by."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LidbSheet",
            display_name="LoRA sheet (lidb-peft)",
            category=_CATEGORY,
            description="Draws every LoRA at every weight with every prompt, with diffusers.",
            inputs=[
                *_base_inputs(),
                io.String.Input("lora_names", multiline=True, default="", tooltip="In models/loras, one a line."),
                io.String.Input("prompts", multiline=True, default="a sks face", tooltip="One a line."),
                io.String.Input("weights", default="0.6, 0.8, 1.0"),
                io.Int.Input("sampling_steps", default=30, min=1, max=150),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet")],
        )

    @classmethod
    def execute(cls, checkpoint, other_base, lora_names, prompts, weights, sampling_steps, seed):
        from hypernet import draw_sheet
        from hypernet.sheets import DrawConfig

        names = _lines(lora_names)
        if not names:
            raise ValueError("there is no LoRA; write the names of some in models/loras, one a line")
        loras = {Path(name).with_suffix("").as_posix(): running.lora_file(name) for name in names}
        with running.words_of_nodes(), running.own_memory():
            sheet = draw_sheet(
                running.chosen_base(other_base.strip() or checkpoint), _lines(prompts), loras, _numbers(weights),
                [seed], DrawConfig(num_steps=sampling_steps), progress=running.Progress().show,
            )  # fmt: skip
        return io.NodeOutput(running.to_images([sheet.image]))


NODES = (LidbPersonalize, LidbPredict, LidbLoad, LidbSheet)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"the weights are {text!r}; write numbers, such as 0.6, 0.8, 1.0") from None
