"""Damaged or hostile files of every kind are read or refused in one sentence, never with a traceback.

A file of each kind is mutated: bits flipped, bytes cut out and put in, the end cut off, JSON values replaced by others.
A few mutations run with the tests; by hand: ``python tests/faults/test_mutations.py --count 8000 --seed 0``.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from PIL import Image

JUNK = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "\x1b[2J", "\ud800", "x" * 5000, [], {}, [[]], {"a": {}})
SLOWEST_S = 30.0


def write_kinds(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Write a file or folder of each kind; returns kind -> where it is and what reads it."""
    from transformers import ViTConfig

    from converters import describe, read_lora
    from converters.convert import prepare_conversion
    from converters.formats.kohya import write_lora
    from converters.formats.lidb import read_lidb_folder
    from converters.metadata import KohyaMetadata
    from converters.sidecar import read_sidecar
    from hypernet.base_models.loading import load_base
    from hypernet.fitting.targets import Shard, TargetStore, create_targets
    from hypernet.inputs.photos import read_image
    from hypernet.network.config import HyperNetworkConfig
    from hypernet.network.hypernetwork import HyperNetwork
    from lidb_peft import LiDBSpace, load_theta, save_theta
    from lidb_peft.sealed import read_tree, write_tree
    from testbed import miniature_lidb_config, miniature_path

    base = load_base(str(miniature_path()), device="cpu")
    space = LiDBSpace(base.adapted, miniature_lidb_config())
    factors = {f"unet.mid_block.attentions.0.transformer_blocks.0.attn{i}.to_q": (torch.ones(1, 8), torch.ones(8, 1))
               for i in (1, 2)}  # fmt: skip
    write_lora(folder / "lora.safetensors", factors, KohyaMetadata(trigger="a face"))
    prepare_conversion(folder / "lora.safetensors", folder / "peft", "peft").write()
    save_theta(folder / "theta.safetensors", space.theta_0, space)
    prepare_conversion(folder / "theta.safetensors", folder / "lidb", "lidb", models=base.adapted).write()
    encoder = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16,
                        patch_size=8)  # fmt: skip
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "k": 1}
    HyperNetwork(HyperNetworkConfig.for_space(space, encoder, "mini", **sizes)).save_pretrained(folder / "net")
    create_targets(folder / "targets", space, "mini", {"steps": 1}, 2, "faces")
    store = TargetStore(folder / "targets", space)
    store.write(0, Shard(("a",), ("key",), ("a",), (), ("digest",)), space.theta_0[None], torch.zeros(1))
    write_tree(folder / "state.safetensors", {"step": 1, "parts": {"optimizer": {0: torch.ones(3)}}})
    Image.new("RGB", (40, 40), "red").save(folder / "photo.png")
    Image.new("RGB", (40, 40), "red").save(folder / "photo.jpg")

    def read_store(path: Path) -> None:
        found = TargetStore(path, space)
        found.thetas(list(found.places))
        found.skipped()

    return {
        "kohya": (folder / "lora.safetensors", lambda path: (read_lora(path), describe(path))),
        "sidecar": (folder / "lora.json", lambda path: read_sidecar(path.with_suffix(".safetensors"))),
        "PEFT": (folder / "peft", lambda path: (read_lora(path), describe(path))),
        "theta": (folder / "theta.safetensors", lambda path: load_theta(path, space)),
        "LiDB": (folder / "lidb", lambda path: read_lidb_folder(path, base.adapted)),
        "hypernetwork": (folder / "net", HyperNetwork.from_pretrained),
        "targets": (folder / "targets", read_store),
        "state": (folder / "state.safetensors", read_tree),
        "PNG": (folder / "photo.png", read_image),
        "JPEG": (folder / "photo.jpg", read_image),
    }


def mutate(path: Path, chance: random.Random) -> None:
    """Damage one file of a file or folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    file = chance.choice(files)
    blob = bytearray(file.read_bytes())
    if file.suffix == ".json" and chance.random() < 0.7:
        tree = json.loads(blob)
        _replace_one(tree, chance)
        file.write_text(json.dumps(tree))
        return
    if file.suffix == ".safetensors" and chance.random() < 0.3:
        file.write_bytes(_with_other_words(bytes(blob), chance))
        return
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(blob)) if blob else 0
        kind = chance.randrange(4)
        if kind == 0 and blob:
            blob[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del blob[at : at + chance.choice([1, 4, 100])]
        elif kind == 2:
            blob[at:at] = chance.randbytes(chance.choice([1, 4, 100]))
        else:
            del blob[at:]
    file.write_bytes(blob)


def _with_other_words(blob: bytes, chance: random.Random) -> bytes:
    """A safetensors file that is whole and says something else: a name, or a text among its metadata, is another."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    place = chance.choice([header, metadata] if metadata else [header])
    key = chance.choice(sorted(place))
    word = chance.choice([word for word in (*JUNK, key + "\x1b[2J", key + "\ud800") if isinstance(word, str)])
    if place is metadata and chance.random() < 0.7:
        try:  # JSON in it stays JSON
            tree = json.loads(metadata[key])
            _replace_one(tree, chance)
            word = json.dumps(tree)
        except ValueError:
            pass
        metadata[key] = word
    elif key != "__metadata__":
        place[word] = place.pop(key)
    text = json.dumps(header, ensure_ascii=chance.random() < 0.5).encode("utf-8", errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]


def _replace_one(tree: object, chance: random.Random) -> None:
    while isinstance(tree, dict | list) and tree:
        key = chance.choice(sorted(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
        if not isinstance(tree[key], dict | list) or not tree[key] or chance.random() < 0.3:
            if isinstance(tree, dict) and chance.random() < 0.3:
                del tree[key]
            else:
                tree[key] = chance.choice(JUNK)
            return
        tree = tree[key]


class Mutations:
    """Files of each kind, mutated one at a time."""

    def __init__(self, place: Path) -> None:
        (place / "whole").mkdir()
        self.place, self.kinds = place, write_kinds(place / "whole")

    def problem(self, kind: str, seed: int) -> str:
        """What went wrong with one mutation; an empty string if it was read, or refused in a sentence."""
        whole, read = self.kinds[kind]
        path = self.place / "mutated" / whole.name
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, path)
        mutate(path, random.Random(f"{kind} {seed}"))
        start = time.process_time()  # of a machine that others use too
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except (ValueError, OSError) as error:
            text = str(error)
            if len(text) > 6000 or not all(char.isprintable() or char == "\n" for char in text):
                return f"{kind} {seed}: not a sentence: {text[:300]!r}"
        except BaseException as error:
            return f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}"
        took = time.process_time() - start
        return f"{kind} {seed}: took {took:.0f} s of the processor" if took > SLOWEST_S else ""


KINDS = ("kohya", "sidecar", "PEFT", "theta", "LiDB", "hypernetwork", "targets", "state", "PNG", "JPEG")


@pytest.fixture(scope="module")
def mutations(tmp_path_factory):
    return Mutations(tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_in_a_sentence(mutations, kind):
    count = 4 if kind in ("LiDB", "hypernetwork") else 12
    assert [problem for seed in range(count) if (problem := mutations.problem(kind, seed))] == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append")
    arguments = parser.parse_args()
    place, done, bad = Path(tempfile.mkdtemp()), Counter(), Counter()
    mutations, kinds = Mutations(place), arguments.only or KINDS
    for number in range(arguments.count):
        kind = kinds[number % len(kinds)]
        problem = mutations.problem(kind, arguments.seed + number // len(kinds))
        done[kind] += 1
        if problem:
            bad[kind] += 1
            print(problem, flush=True)
    print(f"{sum(done.values())} mutations, {sum(bad.values())} bad: {dict(bad)}; seed {arguments.seed}")
    shutil.rmtree(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
