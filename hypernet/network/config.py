"""A hypernetwork's config: its architecture and the space of its predictions, saved as ``config.json``."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from hypernet.network.config_check import EARLIER_NAMES, encoder_config
from hypernet.network.encoder import check_encoder
from hypernet.recipe import NetworkConfig, PersonalizeConfig
from lidb_peft import LiDBConfig, LiDBSpace, record_config, space_record
from lidb_peft.layout import layers_hash


class HyperNetworkConfig(PretrainedConfig):
    """Everything that defines a hypernetwork and the thetas it predicts, except the weights.

    Args:
        encoder: the encoder's config, or its dict, from which `encoder_config` takes the settings it knows.
        layers: ``(name, in_features, out_features)`` of each adapted layer, in the order of their `LiDBSpace`.
        record: the space of the thetas, as given by `lidb_peft.space_record`.
        prompt, token: prompt and token of the training photos; ``[V]`` in the prompt stands for the token.
        train_encoder: whether the encoder is trained.
        learned_bases: learn the bases too, starting from the frozen ones; all identities share them.
        k: number of refinements of each prediction, the paper's k; ``rounds`` in earlier configs.
        hidden_size, num_hidden_layers, num_attention_heads: sizes of the decoder.
        image_size: side of the encoder's input pictures in pixels; default the encoder's own.
        image_mean, image_std: normalization of the encoder's input pictures, which are in [0, 1].
    """

    model_type = "lidb_hypernetwork"
    has_no_defaults_at_init = True
    attribute_map = EARLIER_NAMES

    def __init__(
        self,
        encoder: PretrainedConfig | dict[str, Any] | None = None,
        layers: Sequence[tuple[str, int, int]] | None = None,
        record: dict[str, str] | None = None,
        prompt: str = PersonalizeConfig.prompt,
        token: str = PersonalizeConfig.token,
        train_encoder: bool = False,
        learned_bases: bool = False,
        k: int = NetworkConfig.k,
        hidden_size: int = NetworkConfig.hidden_size,
        num_hidden_layers: int = NetworkConfig.num_hidden_layers,
        num_attention_heads: int = NetworkConfig.num_attention_heads,
        image_size: int | None = None,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        k = kwargs.pop("rounds", k)
        if not (encoder and layers and record):  # transformers 4 tries a config without arguments, and expects this
            raise ValueError("encoder, layers or record is missing; make the config with HyperNetworkConfig.for_space")
        # Always the same form, as a config.json is read: a resumed training writes the bytes of an unbroken one.
        encoder = encoder_config(encoder if isinstance(encoder, dict) else encoder.to_dict())
        check_encoder(encoder)
        if layers_hash({name: shape for name, *shape in layers}) != record.get("layers_hash"):
            raise ValueError("the list of layers is not the one of the record; the config.json is damaged")
        if k < 1:
            raise ValueError(f"k is {k}; choose 1 or more")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size is {hidden_size}; choose a multiple of num_attention_heads, "
                             f"{num_attention_heads}")  # fmt: skip
        if "[V]" not in prompt:
            raise ValueError(f"prompt is {prompt!r}; it must hold [V], which stands for the person")
        self.encoder = encoder
        self.layers: list[list[Any]] = [list(layer) for layer in layers]
        self.record = dict(record)
        self.prompt = prompt
        self.token = token
        self.train_encoder = train_encoder
        self.learned_bases = learned_bases
        self.k = k
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = encoder.image_size if image_size is None else image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**kwargs)

    @classmethod
    def for_space(
        cls, space: LiDBSpace, encoder: PretrainedConfig, base_model_name: str = "", **options: Any
    ) -> "HyperNetworkConfig":
        """Describe a hypernetwork that predicts the thetas of ``space``; ``options`` are the other arguments."""
        layers = [(name, *shape) for name, shape in zip(space.layer_names, space.shapes, strict=True)]
        return cls(encoder, layers, space_record(space, base_model_name), **options)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """``(in_features, out_features)`` of each layer."""
        return [(in_features, out_features) for _, in_features, out_features in self.layers]

    @property
    def lidb(self) -> LiDBConfig:
        """The `LiDBConfig` of the predicted thetas: ``LiDBSpace(base.adapted, config.lidb)`` is their space."""
        return record_config(self.record, self.name_or_path or "the hypernetwork")

    @property
    def trigger(self) -> str:
        """The prompt that triggers the predictions, e.g. ``a sks face``."""
        return self.prompt.replace("[V]", self.token)
