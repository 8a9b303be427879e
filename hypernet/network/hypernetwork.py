"""The hypernetwork: one photo of a person in, theta out (HyperDreamBooth, arXiv:2307.06949, section 4.2).

A vision transformer looks at the photo once. Its tokens, and one token for each adapted layer, go through a small
transformer decoder that refines its prediction k times (equation 3); one linear head per layer makes the
layer's weights. Predicted is a residual on the shared starting vector theta_0.
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from hypernet.errors import first_line
from hypernet.hub import HYPERNETWORK_FILES, local_or_hub_folder
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.config_check import check_config, check_size, todays_names
from hypernet.network.encoder import is_unused, load_encoder, prepare_pictures
from hypernet.quiet import quiet_libraries
from lidb_peft import LiDBSpace, check_record
from lidb_peft.bases import get_basis
from lidb_peft.files import atomic_files
from lidb_peft.layout import distinct_basis_keys, starting_theta, theta_mask
from lidb_peft.safe_read import check_indices, examples, printable, read_header, read_json_object

_WHAT = "the hypernetwork"
HEAD_STD = 1e-3
POSITION_STD = 0.02
_THETA_0_TOLERANCE = 1e-6


class LayerHeads(nn.Module):
    """One linear layer for each token of a sequence: ``(B, L, width)`` to ``(B, L, row)``, always in float32."""

    def __init__(self, num_layers: int, width: int, row_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers, width, row_size))
        self.bias = nn.Parameter(torch.zeros(num_layers, row_size))
        # Small and not zero, so that both halves of theta, and what lies before the heads, get gradients at once.
        nn.init.normal_(self.weight, std=HEAD_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.einsum("blw,lwr->blr", tokens.float(), self.weight.float()) + self.bias.float()


class HyperNetwork(PreTrainedModel):
    """Predicts theta ``(B, L, row)`` from photos; saved and loaded as transformers' models are.

    Attributes:
        theta_0: float32 ``(L, row)``, the shared starting vector.
        mask: bool ``(L, row)``, False in the padding.
        bases: the learned bases by label, for ``LiDBSpace.expand`` and ``factors``; None if they are the frozen ones.
    """

    config_class = HyperNetworkConfig
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    theta_0: Tensor
    mask: Tensor
    _supports_sdpa = True

    def __init__(self, config: HyperNetworkConfig, encoder: PreTrainedModel | None = None, seed: int = 0) -> None:
        """Make a hypernetwork with fresh weights.

        Args:
            encoder: a pretrained one; None makes one of ``config.encoder`` with fresh weights.
            seed: of the fresh weights; the global generator is left as it was.
        """
        super().__init__(config)
        lidb, shapes, width = config.lidb, config.shapes, config.hidden_size
        theta_0 = starting_theta(shapes, lidb)
        num_layers, row_size = theta_0.shape
        self.register_buffer("theta_0", theta_0)
        self.register_buffer("mask", theta_mask(shapes, lidb))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # module constructors draw from it
            encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
            # transformers 4 has CLIP's tower inside a wrapper, 5 has not: without it both name the weights alike.
            self.encoder = getattr(encoder, "vision_model", encoder)
            features = config.encoder.hidden_size
            self.photo_projection = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
            # No bias: in the first round, where there is no prediction yet, the layers' tokens are zero (paper).
            self.prediction_embedding = nn.Linear(row_size, width, bias=False)
            # At first all rounds say the same. With a random embedding the later ones answer to noise: on the miniature
            # four rounds then took twice the steps of one to the same loss; from zero they take fewer.
            nn.init.zeros_(self.prediction_embedding.weight)
            self.layer_positions = nn.Parameter(torch.empty(num_layers, width))
            nn.init.normal_(self.layer_positions, std=POSITION_STD)
            self.decoder = nn.ModuleList(_decoder_layer(config) for _ in range(config.num_hidden_layers))
            self.norm = nn.LayerNorm(width)
            self.heads = LayerHeads(num_layers, width, row_size)
        self.bases: Any = None  # a ParameterDict, which is used as the mapping that it is
        if config.learned_bases:
            keys = distinct_basis_keys(shapes, lidb)
            frozen = {key.label: get_basis(key, torch.device("cpu")) for key in keys}
            self.bases = nn.ParameterDict({label: nn.Parameter(basis.clone()) for label, basis in frozen.items()})
        self.gradient_checkpointing = False
        self.post_init()
        self._set_trainable()

    @classmethod
    def from_encoder(
        cls, source: str | Path, space: LiDBSpace, base_model_name: str = "", seed: int = 0, **options: Any
    ) -> "HyperNetwork":
        """Make a hypernetwork around a pretrained encoder.

        Args:
            source: id or folder of any vision transformer; `hypernet.recipe.DEFAULT_ENCODER`.
            space: whose thetas are to be predicted.
            base_model_name: for people to read.
            options: of `HyperNetworkConfig`.

        Raises:
            FileNotFoundError, ValueError: as `load_encoder`.
        """
        encoder, settings = load_encoder(source)
        config = HyperNetworkConfig.for_space(space, encoder.config, base_model_name, **settings | options)
        return cls(config, encoder, seed)

    def _init_weights(self, module: nn.Module) -> None:
        """Every module has drawn its weights when it was made."""

    def _set_trainable(self) -> None:
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(self.config.train_encoder and not is_unused(name))
        self.train(self.training)

    def train(self, mode: bool = True) -> "HyperNetwork":
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.config.train_encoder:
            self.encoder.eval()
        return self

    def forward(self, pixels: Tensor, return_rounds: bool = False) -> Tensor:
        """Predict theta ``(B, L, row)``, float32, zero in the padding.

        Args:
            pixels: ``(B, 3, h, w)`` in [-1, 1], or ``(B, P, 3, h, w)``, P photos of each person; of any size.
            return_rounds: return every round's prediction, ``(k, B, L, row)``, for a loss on each.

        Raises:
            ValueError: another shape.
        """
        predictions = self.decode(self.encode(pixels))
        return predictions if return_rounds else predictions[-1]

    def encode(self, pixels: Tensor) -> Tensor:
        """Look at the photos once: ``pixels`` as for ``forward`` to tokens ``(B, T, hidden_size)``, averaged over P."""
        if pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; pass (B, 3, h, w) or (B, photos, 3, h, w)")
        photos = pixels if pixels.dim() == 5 else pixels[:, None]
        pictures = prepare_pictures(
            photos.flatten(0, 1), self.config.image_size, self.config.image_mean, self.config.image_std
        )
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            features = self.encoder(pixel_values=pictures.to(next(self.encoder.parameters()).dtype)).last_hidden_state
        features = features.unflatten(0, photos.shape[:2]).mean(dim=1)
        return self.photo_projection(features.to(self.layer_positions.dtype))

    def decode(self, photo_tokens: Tensor) -> Tensor:
        """Refine the prediction (equation 3): tokens ``(B, T, hidden_size)`` to thetas ``(k, B, L, row)``."""
        residuals = [torch.zeros(len(photo_tokens), *self.theta_0.shape, device=photo_tokens.device)]
        for _ in range(self.config.k):
            residuals.append(self._refine(photo_tokens, residuals[-1]))
        return self.theta_0 + torch.stack(residuals[1:])

    def _refine(self, photo_tokens: Tensor, residual: Tensor) -> Tensor:
        layer_tokens = self.prediction_embedding(residual.to(self.layer_positions.dtype)) + self.layer_positions
        tokens = torch.cat([photo_tokens, layer_tokens], dim=1)
        for layer in self.decoder:
            if self.gradient_checkpointing and self.training:
                tokens = self._gradient_checkpointing_func(layer.__call__, tokens)
            else:
                tokens = layer(tokens)
        return self.heads(self.norm(tokens[:, -len(self.theta_0) :])) * self.mask

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Predict as ``forward`` does, wherever ``pixels`` and the hypernetwork are; the thetas are on the CPU."""
        return self(pixels.to(self.device)).cpu()

    def space_on(self, models: dict[str, nn.Module]) -> LiDBSpace:
        """Return the space of the predictions on those of ``models`` that they adapt; raises as `check_space` does."""
        adapted = {name.partition(".")[0] for name, *_ in self.config.layers}
        space = LiDBSpace({name: model for name, model in models.items() if name in adapted}, self.config.lidb)
        self.check_space(space)
        return space

    def check_space(self, space: LiDBSpace) -> None:
        """Raise ValueError unless the predictions are thetas of ``space``; warn if only the base's weights differ."""
        source = f"the hypernetwork {self.name_or_path}".rstrip()
        check_record(self.config.record, space, source)
        if not torch.allclose(self.theta_0.float().cpu(), space.theta_0, rtol=0.0, atol=_THETA_0_TOLERANCE):
            raise ValueError(
                f"{source} starts at another theta_0 than this space: it is damaged or was cast to half precision; "
                f"load it again, in float32"
            )

    def save_pretrained(  # type: ignore[override]  # transformers' many options are passed on
        self, save_directory: str | Path, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            dtype: what parameters are stored in, float16 for half the size; None leaves them as they are.
            options: of transformers' own method.
        """
        if dtype is not None:
            parameters = dict(self.named_parameters())
            options["state_dict"] = {k: v.to(dtype) if k in parameters else v for k, v in self.state_dict().items()}
        with atomic_files(save_directory) as folder, quiet_libraries():
            super().save_pretrained(folder, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers' many options are passed on
        cls, source: str | Path, **options: Any
    ) -> "HyperNetwork":
        """Load a hypernetwork from a folder or the hub, in float32 and evaluation mode.

        Args:
            options: of transformers' own method; ``config`` is what `read_config` has read of ``source``.

        Raises:
            FileNotFoundError: it is neither here nor on the hub.
            ValueError: it is damaged, no hypernetwork, or its weights do not fit its config.
        """
        config = options.pop("config", None) or read_config(source)
        folder = local_or_hub_folder(source, _WHAT, HYPERNETWORK_FILES)
        try:
            with quiet_libraries():
                loaded: Any = super().from_pretrained(
                    folder, config=config, use_safetensors=True, output_loading_info=True,
                    **cast(dict[str, Any], _float32()), **options,
                )  # fmt: skip
                model, info = loaded
        except OSError as error:
            raise FileNotFoundError(f"{_WHAT} {source} is not whole ({first_line(error)}); get it again") from error
        except RuntimeError as error:
            raise ValueError(f"{source} holds other weights than its config.json says: {first_line(error)}") from error
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"{source} holds other weights than its config.json says: missing "
                f"{examples(sorted(info['missing_keys'])) or 'none'}, unexpected "
                f"{examples(sorted(info['unexpected_keys'])) or 'none'}"
            )
        model.name_or_path = model.config.name_or_path = str(source)
        model._set_trainable()
        return model


def read_config(source: str | Path) -> HyperNetworkConfig:
    """Read what a hypernetwork is, without its weights; of those in a folder the headers are checked.

    Raises:
        FileNotFoundError: it is neither here nor on the hub.
        ValueError: it is damaged, or no hypernetwork.
    """
    return _check_files(str(source), local_or_hub_folder(source, _WHAT, HYPERNETWORK_FILES))


def _decoder_layer(config: HyperNetworkConfig) -> nn.TransformerEncoderLayer:
    """Self-attention over photo and layer tokens alike (pre-norm, through SDPA)."""
    return nn.TransformerEncoderLayer(
        config.hidden_size, config.num_attention_heads, 4 * config.hidden_size,
        dropout=0.0, activation="gelu", batch_first=True, norm_first=True,
    )  # fmt: skip


def _check_files(source: str, folder: Path) -> HyperNetworkConfig:
    """Read the config, and find a folder's damage by the files' headers, before transformers says so in its words."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} is not a hypernetwork: it has no config.json; name the folder that has it")
    found = todays_names(read_json_object(folder / "config.json", "get the hypernetwork again"))
    _check_type(source, found)
    check_config(source, found, HyperNetworkConfig)
    check_indices(folder, "get the hypernetwork again")
    files = list(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} is not a whole hypernetwork: it has no model.safetensors; get it again")
    stored = [math.prod(info.shape) for file in files for info in read_header(file).tensors.values()]
    config = HyperNetworkConfig.from_dict(found)
    config.name_or_path = source
    check_size(source, config, sum(stored))
    _ = config.lidb  # a kind of bases may be unknown here
    return config


def _check_type(source: str | Path, config: dict[str, Any]) -> None:
    found = config.get("model_type")
    if found != HyperNetworkConfig.model_type:
        raise ValueError(
            f"{source} holds a model of type {printable(repr(found))}; expected {HyperNetworkConfig.model_type!r}"
        )


def _float32() -> dict[str, torch.dtype]:
    """transformers called this argument ``torch_dtype`` until 4.56; its default would be the stored dtype since 5."""
    import transformers
    from packaging.version import Version

    return {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": torch.float32}
