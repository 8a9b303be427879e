"""FLUX.1: a guidance-distilled transformer conditioned on CLIP's pooled prompt and T5's tokens.

kohya's names and the fused layers are those of the original authors' code (black-forest-labs/flux, ``src/flux``), which
sd-scripts' ``networks/lora_flux.py`` trains; diffusers' ``FluxTransformer2DModel`` has each projection by itself.
"""

from . import clip
from .family import Component, Family, Mark, Shapes, Stacked, Version

_WIDTH, _NUM_DOUBLE, _NUM_SINGLE = 3072, 19, 38
_TARGETS = frozenset(
    {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}  # of both streams
)
_WORDS = """
    transformer_blocks single_transformer_blocks attn to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out
    norm norm1 norm1_context linear ff ff_context net proj proj_mlp proj_out x_embedder context_embedder
    time_text_embed timestep_embedder text_embedder guidance_embedder linear_1 linear_2
    double_blocks single_blocks img_attn txt_attn qkv img_mlp txt_mlp img_mod txt_mod lin linear1 linear2 modulation
    img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer
"""
_T5_WORDS = "encoder block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo"


def _originals() -> tuple[Stacked, ...]:
    double, single, ours = "double_blocks.{}", "single_blocks.{}", "transformer_blocks.{}"
    streams = (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
    )
    table = []
    for stream, inputs, output, feed_forward, norm in streams:
        table += [
            Stacked(tuple(f"{ours}.attn.{name}" for name in inputs), f"{double}.{stream}_attn.qkv"),
            Stacked((f"{ours}.attn.{output}",), f"{double}.{stream}_attn.proj"),
            Stacked((f"{ours}.{feed_forward}.net.0.proj",), f"{double}.{stream}_mlp.0"),
            Stacked((f"{ours}.{feed_forward}.net.2",), f"{double}.{stream}_mlp.2"),
            Stacked((f"{ours}.{norm}.linear",), f"{double}.{stream}_mod.lin"),
        ]
    fused = tuple(f"single_{ours}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    table += [
        Stacked(fused, f"{single}.linear1", widths=(1, 1, 1, 4)),
        Stacked((f"single_{ours}.proj_out",), f"{single}.linear2"),
        Stacked((f"single_{ours}.norm.linear",), f"{single}.modulation.lin"),
        Stacked(("x_embedder",), "img_in"),
        Stacked(("context_embedder",), "txt_in"),
        Stacked(("proj_out",), "final_layer.linear"),
    ]
    for embedder, original in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for number, layer in ((1, "in_layer"), (2, "out_layer")):
            table.append(Stacked((f"time_text_embed.{embedder}_embedder.linear_{number}",), f"{original}_in.{layer}"))
    return tuple(table)


def _attention_shapes() -> Shapes:
    single = ("to_k", "to_q", "to_v")
    double = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    names = [f"single_transformer_blocks.{i}.attn.{name}" for i in range(_NUM_SINGLE) for name in single]
    names += [f"transformer_blocks.{i}.attn.{name}" for i in range(_NUM_DOUBLE) for name in double]
    return dict.fromkeys(names, (_WIDTH, _WIDTH))


FLUX1 = Family(
    name="flux1",
    title="FLUX.1",
    a1111_version="Flux",
    components=(
        Component(
            name="transformer",
            title="transformer",
            role="denoiser",
            classes=("FluxTransformer2DModel",),
            targets=_TARGETS,
            shapes=_attention_shapes(),
            words=frozenset(_WORDS.split()),
            path=r"(^|\.)((single_)?transformer|double|single)_blocks\.\d+\.",
            block_names=(
                (r"double_blocks\.(\d+)\.", "D{:02}"),
                (r"single_blocks\.(\d+)\.", "S{:02}"),
                (r"final_layer\.", "OUT"),
                ("", "IN"),
            ),
            trained=("transformer_blocks.",),
            num_blocks={"transformer_blocks": _NUM_DOUBLE, "single_transformer_blocks": _NUM_SINGLE},
            kohya_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            path_prefixes=("diffusion_model.", "model.diffusion_model."),
            kohya_uses_originals=True,
            kohya_attribute="double_blocks",
            stacked=_originals(),
            checkpoint_prefixes=("model.diffusion_model.", ""),
            config={"joint_attention_dim": 4096},
        ),
        clip.text_encoder(
            num_layers=12,
            width=768,
            title="CLIP text encoder",
            path_prefixes=clip.path_prefixes("clip_l"),
            kohya_prefixes=("lora_te1_", "lora_te_"),
            checkpoint_prefixes=("text_encoders.clip_l.transformer.",),
            block_names=(("", "CLIP"),),
            is_adapted=False,
        ),
        Component(
            name="text_encoder_2",
            title="T5 text encoder",
            role="text encoder",
            classes=("T5EncoderModel",),
            targets=frozenset(),
            shapes={},
            words=frozenset(_T5_WORDS.split()),
            path=r"(^|\.)encoder\.block\.\d+\.",
            trained=("encoder.block.",),
            kohya_prefixes=("lora_te3_", "lora_te2_"),
            path_prefixes=clip.path_prefixes("t5xxl"),
            checkpoint_prefixes=("text_encoders.t5xxl.transformer.",),
            block_names=(("", "T5"),),
            is_adapted=False,
        ),
    ),
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
    pipeline_options={},
    latent_channels=16,
    vae_scale_factor=8,
    versions=(
        Version("flow", "flux1", "flux-1-dev", 1024),
        Version("flow", "flux1", "flux-1-schnell", 1024),
    ),
    implementation="https://github.com/black-forest-labs/flux",
    network_module="networks.lora_flux",
    metadata={"ss_v2": "False"},
    marks=(
        Mark("^lora_unet_(double|single)_blocks_"),
        Mark(r"(^|[._])(single_)?transformer_blocks[._]", "transformer"),
        Mark(r"(^|\.)(double|single)_blocks\.", "transformer"),
        Mark(r"encoder[._]block[._]\d", "text_encoder_2"),
    ),
    stated_by={"ss_base_model_version": "flux1", "modelspec.architecture": ("flux-1", "Flux.1")},
    checkpoint_markers={"double_blocks.0.img_attn.qkv.weight": 2},
    has_guidance_embeds=True,
    reads_mixed_ranks=True,
    block_lists=(
        (
            "CLIP",
            "T5",
            "IN",
            *(f"D{i:02}" for i in range(_NUM_DOUBLE)),
            *(f"S{i:02}" for i in range(_NUM_SINGLE)),
            "OUT",
        ),
    ),
    has_old_diffusers_names=False,
)
