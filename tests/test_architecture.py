"""Which package may import which, what importing costs, and that nothing is unpickled."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lidb_peft.families import COMPONENTS, FAMILIES

ROOT = Path(__file__).parents[1]
CHAIN = ("cli", "testbed", "hypernet", "converters", "lidb_peft")
PARTS = {
    "hypernet": ("evaluation", "training", "fitting", "network", "inputs"),
    "converters": ("inspection", "arithmetic", "formats"),
}
# What puts the parts of a package together: no part may import it.
HEADS = {
    "hypernet": ("request", "opened_request", "personalized", "personalization", "personalization_each", "comparison"),
    "converters": ("batch", "convert"),
}
FILES = [file for package in CHAIN for file in sorted((ROOT / package).rglob("*.py"))]
# Entry points like the CLI: each may reach one package to the left, and nothing may import it.
ENTRIES = {Path("lidb_peft/kohya.py"): "converters", Path("lidb_peft/__main__.py"): "cli"}
OPTIONAL = {"bitsandbytes", "xformers", "mediapipe", "tensorboard", "tensorflow", "triton", "wandb", "matplotlib",
            "skimage", "datasets", "pillow_heif", "dlib", "facenet_pytorch", "torchmetrics"}  # fmt: skip
OF_ONE_KIND = {"unet", "time_ids", "alphas_cumprod", "added_cond_kwargs", "img_ids", "sd1", "sd2", "sdxl", "flux",
               "flux1", "text_encoder_2"}  # fmt: skip
# What a family is, is in lidb_peft/families; who names one elsewhere has a reason, which is said here.
NAMES_FAMILIES = {
    Path("hypernet/base_models/stable_diffusion.py"): "the base models of Stable Diffusion 1, 2 and XL",
    Path("hypernet/base_models/flux.py"): "the base model of FLUX.1",
    Path("testbed/train.py"): "makes the miniature, which is a Stable Diffusion",
}
UNPICKLERS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


def parse(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_modules(file: Path) -> set[str]:
    """Full names of what a file imports, at any depth of it; relative ones are resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_there_is_something_to_check():
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(CHAIN)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_to_the_right_only(file):
    relative = file.relative_to(ROOT)
    allowed = set(CHAIN[CHAIN.index(relative.parts[0]) :])
    allowed |= {ENTRIES[relative]} if relative in ENTRIES else set()
    ours = {name for name in imported_modules(file) if name.split(".")[0] in CHAIN}
    assert {name for name in ours if name.split(".")[0] not in allowed} == set()
    entries = tuple(".".join(entry.with_suffix("").parts) for entry in ENTRIES if entry != relative)
    assert not any(name.startswith(entries) for name in ours)


@pytest.mark.parametrize(("package", "part"), [(package, part) for package in PARTS for part in PARTS[package]])
def test_parts_of_a_package_import_to_the_right_only(package, part):
    to_the_left = PARTS[package][: PARTS[package].index(part)]
    forbidden = {f"{package}.{name}" for name in (*to_the_left, *HEADS[package])}
    files = sorted((ROOT / package / part).glob("*.py"))
    assert len(files) > 1
    for file in files:
        assert not {".".join(name.split(".")[:2]) for name in imported_modules(file)} & forbidden, file


@pytest.mark.parametrize("package", PARTS)
def test_what_stands_beside_the_parts_of_a_package_is_their_ground_and_imports_none_of_them(package):
    modules = {file.stem: file for file in (ROOT / package).glob("*.py")}
    imports = {path.relative_to(ROOT): imported_modules(path) for path in (ROOT / package).glob("*/*.py")}
    ground = {name for name in modules if any(f"{package}.{name}" in found for found in imports.values())}
    assert ground
    parts = tuple(f"{package}.{part}." for part in PARTS[package])
    for name in ground:
        assert not [imported for imported in imported_modules(modules[name]) if imported.startswith(parts)], name


@pytest.mark.parametrize(
    "file", sorted((ROOT / "hypernet").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT))
)
def test_what_one_kind_of_base_model_has_is_named_by_its_own_file(file):
    """Fitting, training and sampling ask `BaseModel`; beside them, only the folder of base models knows which it is."""
    if file.parent.name != "base_models":
        words = set(re.findall(r"\w+", file.read_text(encoding="utf-8").lower()))
        assert not words & OF_ONE_KIND


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_pickled_or_unpickled(file):
    assert not {name.split(".")[0] for name in imported_modules(file)} & UNPICKLERS
    for call in (node for node in ast.walk(parse(file)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in ("torch.load", "torch.save"), f"line {call.lineno} pickles"
        assert options.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        assert name not in ("eval", "exec", "torch.hub.load"), f"line {call.lineno}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_library_code_seeds_a_global_generator(file):
    forbidden = {"torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed", "random.seed",
                 "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "set_seed"}  # fmt: skip
    called = {ast.unparse(node.func) for node in ast.walk(parse(file)) if isinstance(node, ast.Call)}
    assert not called & forbidden


def texts(tree: ast.AST) -> list[ast.Constant]:
    """The strings of a file that are no docstrings and no annotations."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(node.value)
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                skipped |= set(ast.walk(getattr(node, name)))
    return [node for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped]  # fmt: skip


def tables_of_families(tree: ast.AST) -> list[str]:
    """Tables, written as dicts, of which two keys or more are families or pipelines."""
    keyed_by = set(FAMILIES) | {name for family in FAMILIES.values() for name in family.pipelines}
    found = []
    for node in ast.walk(tree):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
            keys = [keyword.arg for keyword in node.keywords]
        if len(keyed_by & set(keys)) > 1:
            found.append(f"line {node.lineno}: {keys}")
    return found


def named_families(tree: ast.AST) -> list[str]:
    """Families, pipelines and components that a file names: as text, as how a layer's name begins, as an attribute."""
    components = [component for family in FAMILIES.values() for component in family.components]
    names = set(FAMILIES) | set(COMPONENTS) | {name for family in FAMILIES.values() for name in family.pipelines}
    starts = (*(f"{name}." for name in COMPONENTS), *(start for part in components for start in part.kohya_prefixes))
    found = [node for node in texts(tree) if node.value in names or node.value.startswith(starts)]
    found += [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in COMPONENTS]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_keyed_by_a_family_is_in_its_file_and_nobody_else_names_one(file):
    relative = file.relative_to(ROOT)
    if relative.parts[:2] == ("lidb_peft", "families"):
        return
    assert not tables_of_families(parse(file))
    if relative not in NAMES_FAMILIES:
        assert not named_families(parse(file))


def test_the_guard_of_families_sees_what_it_is_to_see_and_its_exceptions_are_needed():
    first, second = list(FAMILIES)[:2]
    pipelines = [family.pipelines[0] for family in FAMILIES.values()][-2:]
    for code in (f"X = {{{first!r}: 1, {second!r}: 2}}", f"X = {{{pipelines[0]!r}: 1, {pipelines[1]!r}: 2}}",
                 f"X = dict({first}=1, {second}=2)"):  # fmt: skip
        assert tables_of_families(ast.parse(code)), code
    component = FAMILIES[first].denoiser
    for code in (f"x == {first!r}", f"x = {component.name!r}", f"x.startswith('{component.name}.')",
                 f"base.{component.name}", f"x = f'{component.kohya_prefixes[0]}y'"):  # fmt: skip
        assert named_families(ast.parse(code)), code
    assert not named_families(ast.parse(f"{first!r}\nx: {first!r} = y"))
    for file in NAMES_FAMILIES:
        assert named_families(parse(ROOT / file)), f"{file} needs no exception any more"


def test_the_files_of_families_are_data_and_import_nothing_that_computes():
    files = list((ROOT / "lidb_peft" / "families").glob("*.py"))
    brought = {name for file in files for name in imported_modules(file)}
    ours = {name for name in brought if name.startswith("lidb_peft.families")}
    assert {name.split(".")[0] for name in brought - ours} <= {"dataclasses", "typing", "collections"}


def test_only_bundles_are_imported_by_name():
    """The one way to the left: what ships in a package is found when its name is asked for, as a plugin is."""
    found = {
        file.relative_to(ROOT): ast.unparse(call.args[0])
        for file in FILES
        for call in ast.walk(parse(file))
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in ("import_module", "__import__")
    }
    assert found == {
        Path("cli/main.py"): "COMMANDS[name]",
        Path("hypernet/__init__.py"): "_PLACES[name]",
        Path("hypernet/bundles.py"): "name",
        Path("hypernet/quiet.py"): "f'{name}.utils.logging'",
    }
    from hypernet.bundles import BUNDLES

    assert set(BUNDLES) <= set(CHAIN[: CHAIN.index("hypernet")])


def test_importing_brings_in_no_optional_dependency_and_touches_no_generator():
    script = """
import json, sys
import torch, peft, transformers  # whatever these three import is not ours to forbid
before = set(sys.modules)
state = torch.get_rng_state()
import lidb_peft
assert "cv2" not in sys.modules  # which is for finding faces
import converters, hypernet, testbed, cli
import hypernet.personalization, hypernet.doctor, testbed.demo, cli.main
assert torch.equal(torch.get_rng_state(), state)
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    brought = set(json.loads(result.stdout))
    assert set(CHAIN) <= brought
    assert not brought & OPTIONAL
    assert "diffusers" not in brought  # it takes seconds, and imports every optional package that is installed
