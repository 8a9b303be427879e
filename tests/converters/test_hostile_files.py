"""Whatever is in a file, it is read or refused in one sentence; ``fuzz_reader.py`` runs this property for hours."""

import json
import struct
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.inspect import as_text
from converters.formats.reading import read_lora
from converters.inspection.describe import describe
from lidb_peft.safe_read import read_tensors

MAX_SENTENCE_CHARS = 4000
LAYERS = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "lora_unet_input_blocks_4_1_proj_in",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te2_encoder_layers_0_self_attn_out_proj",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.mid_block.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k",
)
PARTS = (
    "lora_down.weight", "lora_up.weight", "alpha", "lora_A.weight", "lora_B.weight", "lora.down.weight", "dora_scale",
    "lora_mid.weight", "hada_w1_a", "lokr_w1", "diff", "lidb_down",
)  # fmt: skip
KEYS = (
    "theta", "emb_params", "lidb_basis.down_20_8_0", "conv_in.weight", "model.diffusion_model.x", "__metadata__", "",
    "../../x", "a\x00b", "\x1b[2J", "\U0001f600", *(f"{layer}.{part}" for layer in LAYERS[:3] for part in PARTS[:3]),
)  # fmt: skip
DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "BOOL": 1, "U16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "C64": 8}
METADATA = (
    "ss_output_name", "ss_tag_frequency", "sshs_model_hash", "ss_base_model_version", "ss_v2", "lora_adapter_metadata",
    "modelspec.trigger_phrase", "modelspec.architecture", "modelspec.title", "lidb.r", "lidb.num_layers", "lidb.seed",
)  # fmt: skip
HOSTILE_TEXT = st.sampled_from(
    ["", "{}", "[]", "null", '{"a": {"b": 1e999}}', '{"1_a": {"x": true, "y": -1}}', "[" * 2000, "9" * 5000, "\ud800",
     "../../../etc/passwd", "C:\\x\\..", "<lora:a:1>", "\x1b]0;x\x07", "NaN", '{"unet.r": [], "unet.alpha_pattern": 3}',
     '{"unet.r": 1e999, "unet.lora_alpha": -1, "unet.rank_pattern": {"to_q": "x"}}'],
)  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([2**63, 10**30]),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), inner),
    max_leaves=20,
)


@dataclass
class Entry:
    dtype: str
    shape: list[int]
    data: bytes


@st.composite
def entries(draw, shapes=st.lists(st.integers(0, 3), max_size=5)) -> Entry:  # noqa: B008 - a strategy, not a value
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(shapes)
    size = DTYPES[dtype]
    for side in shape:
        size *= side
    # All ones is NaN in every float, 7C00 and 7F800000 are infinity.
    pattern = draw(
        st.sampled_from([b"\0", b"\xff", b"\x00\x7c", b"\x00\x00\x80\x7f"]) | st.binary(min_size=1, max_size=9)
    )
    return Entry(dtype, shape, (pattern * size)[:size])


@st.composite
def modules(draw) -> dict[str, Entry]:
    """The tensors of one whole kohya module."""
    name, rank = draw(st.sampled_from(LAYERS[:3])), draw(st.integers(1, 3))
    tail = draw(st.sampled_from([[], [1, 1], [3, 3]]))
    shapes = {"lora_down.weight": [rank, 2, *tail], "lora_up.weight": [3, rank, *[1 for _ in tail]], "alpha": []}
    return {f"{name}.{part}": draw(entries(st.just(shape))) for part, shape in shapes.items()}


@st.composite
def files(draw) -> bytes:
    """A safetensors file of unlikely content, and then perhaps one whose header or bytes lie."""
    names = (
        st.builds("{}.{}".format, st.sampled_from(LAYERS), st.sampled_from(PARTS)) | st.sampled_from(KEYS) | st.text()
    )
    others = st.dictionaries(names, entries(), max_size=8)
    tensors = draw(modules() | st.just({})) | draw(st.just({}) | others)
    header: dict[str, object] = {}
    data = b""
    for name, entry in tensors.items():
        offsets = [len(data), len(data) + len(entry.data)]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        data += entry.data
    header["__metadata__"] = draw(st.dictionaries(st.sampled_from(METADATA), HOSTILE_TEXT | st.text(), max_size=4))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(header)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", ""]))
        if field and isinstance(header[name], dict):
            header[name][field] = draw(JUNK)
        else:
            header[name] = draw(JUNK)
    text = json.dumps(header).encode()
    blob = struct.pack("<Q", len(text)) + text + data
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(blob)))
        blob = blob[:at] + draw(st.binary(max_size=4)) + blob[at + draw(st.integers(0, 3)) :]
    return blob


def check(path, blob: bytes) -> None:
    """Every reader takes the file, or refuses it with one sentence; what it says of it can be printed and parsed."""
    path.write_bytes(blob)
    for reader in (read_tensors, read_lora, describe):
        try:
            found = reader(path)
        except ValueError as error:
            message = str(error)
            assert str(path) in message, message
            assert message.isprintable(), message
            assert len(message) < MAX_SENTENCE_CHARS
            continue
        if reader is describe:
            assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["path"] == str(path)
            assert all(line.isprintable() for line in as_text(found).splitlines())
            as_text(found).encode()


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(files())
def test_any_file_is_read_or_refused_in_one_sentence(tmp_path_factory, blob):
    check(tmp_path_factory.getbasetemp() / "hostile.safetensors", blob)
