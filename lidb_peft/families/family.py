"""The description of a family of base models: everything that the rest of the package must know about one.

Data only, and light to import: functions that compute with a family are elsewhere, and take it as an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Layer name without its component -> (in_features, out_features).
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Stacked:
    """Several of our layers that are one layer in the original authors' model, with their rows stacked.

    Args:
        ours: paths, with ``{}`` for a block's number.
        original: the path of the one layer, likewise.
        widths: numbers of rows, relative to each other; () if they are equal.
    """

    ours: tuple[str, ...]
    original: str
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Component:
    """A part of the pipeline that adapters may be on.

    Args:
        name: the pipeline's attribute, the folder in diffusers' layout, and how our layer names begin.
        title: its name in messages.
        role: which of the two kinds of models it is.
        classes: names of its class in diffusers or transformers.
        targets: ends of the names of the linear layers that LiDB adapts, its default ``target_modules``.
        shapes: those layers in the published models, in natural order, as ``LiDBSpace`` lists them.
        words: every word of its module paths that is no number; kohya's names join them by underscores.
        path: regular expression that finds a path of this component, and of no other of its role.
        block_names: pairs (regular expression, format of its numbers): what block weights and statistics call the block
            of an original path that begins so.
        trained: what is in the paths of the layers that kohya trains by default, and every reader loads.
        num_blocks: name of a list of blocks -> how many the published models have; for those with paths that other
            families' models have too.
        level: prefix of its layers' paths in LoRA files, whatever the installed library calls them.
        modules: regular expression of the paths of modules that an update may be on; "" takes any path of ``words``.
        kohya_prefixes: prefixes of kohya's names of its layers: the first is written, all are read.
        path_prefixes: prefixes of dotted names of its layers in files, besides its own name.
        originals: pairs (ours, original) of path prefixes, from the names that the original authors gave its modules.
        kohya_uses_originals: kohya's names are built from the original paths, not from diffusers'.
        kohya_attribute: an attribute that the model has in sd-scripts, and no other family's model of its role.
        stacked: whole paths, likewise, of layers that are stacked or whose names follow no such prefixes.
        transposed: pairs (ours, original) of weights that are transposed in the original, without ``.weight``.
        checkpoint_prefixes: prefixes of its tensors in a single-file checkpoint.
        convolutions: last words of the names of its convolutions -> side of the kernel; all other layers are linear.
        kohya_convolutions: last words of the names of linear layers that are 1x1 convolutions in sd-scripts.
        config: entries of its config that distinguish this family's published models from others of the same classes.
        is_adapted: whether it is adapted by default.
        num_heads: of a denoiser's attentions; 0 for one to 64 channels.
        activation: activation function of a text encoder, by its name in transformers.
        pad_token: token that pads a text encoder's prompts.
    """

    name: str
    title: str
    role: Literal["denoiser", "text encoder"]
    classes: tuple[str, ...]
    targets: frozenset[str]
    shapes: Shapes
    words: frozenset[str]
    path: str
    trained: tuple[str, ...]
    kohya_prefixes: tuple[str, ...]
    block_names: tuple[tuple[str, str], ...] = ()
    num_blocks: Mapping[str, int] = field(default_factory=dict)
    level: str = ""
    modules: str = ""
    path_prefixes: tuple[str, ...] = ()
    originals: tuple[tuple[str, str], ...] = ()
    kohya_uses_originals: bool = False
    kohya_attribute: str = ""
    stacked: tuple[Stacked, ...] = ()
    transposed: tuple[tuple[str, str], ...] = ()
    checkpoint_prefixes: tuple[str, ...] = ()
    convolutions: Mapping[str, int] = field(default_factory=dict)
    kohya_convolutions: frozenset[str] = frozenset()
    config: Mapping[str, object] = field(default_factory=dict)
    is_adapted: bool = True
    num_heads: int = 0
    activation: str = ""
    pad_token: str = ""

    @property
    def short_names(self) -> tuple[str, ...]:
        """Its name in weights for the parts of a LoRA, as in A1111's ``<lora:name:te=0.5:unet=1>``."""
        return (self.name, "unet" if self.role == "denoiser" else "te")

    @property
    def tokenizer(self) -> str:
        """The pipeline's attribute, and folder, of a text encoder's tokenizer."""
        return self.name.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Version:
    """A published model of a family, and its names in LoRA files.

    Args:
        prediction_type: what its denoiser predicts, in the terms of diffusers' schedulers: ``epsilon``,
            ``v_prediction``; or
            ``flow``, of flow matching.
        base_version: kohya's ``ss_base_model_version``.
        architecture: ModelSpec's, without the ``/lora`` behind it.
        size_px: side of its square training pictures.
    """

    prediction_type: str
    base_version: str
    architecture: str
    size_px: int


@dataclass(frozen=True)
class Mark:
    """A layer that identifies the family of an adapter.

    Args:
        pattern: regular expression that is searched for in the layer's name, as it is in the file.
        component: component of the layer; "" for any.
        in_features: input width of the layer; 0 for any.
        is_certain: overrides the file's metadata; otherwise it counts only if they do not state the family.
    """

    pattern: str
    component: str = ""
    in_features: int = 0
    is_certain: bool = True


@dataclass(frozen=True)
class Family:
    """Base models of one architecture.

    Args:
        name: its name in options, files and messages.
        title: its full name.
        a1111_version: its name in Automatic1111 and Forge.
        components: the denoiser first, in the order in which spaces list them.
        pipelines: diffusers' classes whose folders hold such a model; the first one loads it.
        pipeline_options: arguments of that class besides the models: nothing that censors or watermarks pictures.
        latent_channels, vae_scale_factor: channels of the latents, and pixels to a latent's side.
        versions: what was published; the first is the one meant where nothing says otherwise.
        has_guidance_embeds: the denoiser has a guidance input, because it is guidance-distilled.
        implementation: ModelSpec's.
        network_module: sd-scripts' module that trains its LoRAs, in their metadata.
        metadata: further kohya metadata of its LoRAs.
        marks: layers that identify an adapter for this family.
        stated_by: metadata key -> possible prefixes of its value in adapters for this family.
        is_hidden_unless_stated: Automatic1111 takes a LoRA without such metadata for another family's.
        checkpoint_markers: tensors of the denoiser, in the original authors' names, that only single-file checkpoints
            of this architecture have -> their number of dimensions.
        vae_prefixes: prefixes of the VAE's tensors in a whole checkpoint; () if single files hold only a denoiser.
        scaling_factor: factor for the VAE's latents.
        scheduler: diffusers' class and its arguments, for a whole checkpoint, which has none.
        reads_mixed_ranks: programs accept a rank and alpha for each layer of its LoRAs; else a file has one of each.
        has_old_diffusers_names: diffusers had such models before 0.20.
        kohya_blocks: blocks of kohya's block-wise learning rates: those going down, and as many up, and in the middle.
        block_lists: the blocks of each list of block weights that sd-webui-lora-block-weight and kohya's
            ``svd_merge_lora.py`` accept; lists are told apart by their length.
    """

    name: str
    title: str
    a1111_version: str
    components: tuple[Component, ...]
    pipelines: tuple[str, ...]
    pipeline_options: Mapping[str, object]
    latent_channels: int
    vae_scale_factor: int
    versions: tuple[Version, ...]
    implementation: str
    marks: tuple[Mark, ...]
    stated_by: Mapping[str, str | tuple[str, ...]]
    checkpoint_markers: Mapping[str, int]
    vae_prefixes: tuple[str, ...] = ()
    scaling_factor: float = 1.0
    scheduler: tuple[str, Mapping[str, object]] = ("", {})
    network_module: str = "networks.lora"
    has_guidance_embeds: bool = False
    reads_mixed_ranks: bool = False
    has_old_diffusers_names: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_hidden_unless_stated: bool = False
    kohya_blocks: tuple[int, int] | None = None
    block_lists: tuple[tuple[str, ...], ...] = ()

    @property
    def denoiser(self) -> Component:
        """The model that predicts the noise."""
        return self.components[0]

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The models that encode the prompt."""
        return self.components[1:]

    @property
    def targets(self) -> frozenset[str]:
        """The ``target_modules`` of one config for all components."""
        return frozenset().union(*(component.targets for component in self.components))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name -> ``(in_features, out_features)`` of all layers that LiDB can adapt in the published models."""
        return {f"{part.name}.{path}": shape for part in self.components for path, shape in part.shapes.items()}

    @property
    def prediction_types(self) -> tuple[str, ...]:
        """The possible prediction types of its denoisers; if there are several, a model must state its own."""
        return tuple(dict.fromkeys(version.prediction_type for version in self.versions))

    def component(self, name: str) -> Component | None:
        """Return the component of that name, None if there is none."""
        return next((component for component in self.components if component.name == name), None)

    def version(self, prediction_type: str = "") -> Version:
        """Return the published model with that prediction type; the first one if there is none, or for ""."""
        fitting = (version for version in self.versions if version.prediction_type == prediction_type)
        return next(fitting, self.versions[0])
