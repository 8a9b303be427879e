"""Writes docs/api.md from the docstrings: ``python docs/api.py``; a test says when it has to be run again.

The source is read and not imported, so that annotations and defaults stand as they are written.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = """# API reference

Written by `python docs/api.py` from the docstrings. Shapes are torch's: a linear layer's weight is (out, in). L is the
number of adapted layers, r the rank, a and b the sizes of the bases on the input and the output side; a row of theta
has r * (a + b) numbers. `*batch` may be empty. What is not listed here may change without notice.
"""
# What hypernet is used by from Python beside its __all__, by the end of the dotted name.
HYPERNET = (
    "BaseModel", "BaseConfig", "NetworkConfig", "StartConfig",
    "PersonalizeConfig", "Personalization", "personalize_to_files", "PersonalizedEach", "load_photo",
    "open_photos", "Crop", "StepReport", "open_people", "PreoptimizeConfig", "TargetStore", "TrainConfig",
    "HyperNetworkConfig", "predicted_recipe", "FitConfig", "Subject", "fit_theta", "fit_lora", "generate_to_file",
    "DrawConfig", "Sheet", "SheetPicture", "Infotext", "read_picture",
)  # fmt: skip
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.MULTILINE)


class Definition(NamedTuple):
    """A class, function or type alias, and the line above it: an alias has no docstring but a comment there."""

    node: ast.stmt
    comment: str


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """Return the whole page.

    Raises:
        KeyError: a public name is defined nowhere, or twice.
    """
    parts = [INTRODUCTION]
    for package in ("hypernet", "lidb_peft", "converters"):
        definitions = _definitions(package)
        parts.append(f"## {package}\n")
        lazy = _assigned(package, "_PLACES") or {}
        for name in _assigned(package, "__all__"):
            place = f"{lazy[name]}.{name}" if name in lazy else _only_place(name, definitions)
            parts += _entry(f"{package}.{name}", definitions[place])
        if package == "hypernet":
            for place in (_only_place(name, definitions) for name in HYPERNET):
                parts += _entry(place, definitions[place])
    return "\n".join(parts)


def _only_place(name: str, definitions: dict[str, Definition]) -> str:
    places = [place for place in definitions if place.endswith(f".{name}")]
    if len(places) != 1:
        raise KeyError(f"{name} is defined in {places}; expected one place")
    return places[0]


def _assigned(package: str, name: str) -> Any:
    """What a package's ``__init__`` assigns to a name; None if nothing."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    found = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name]
    return ast.literal_eval(found[0]) if found else None


def _definitions(package: str) -> dict[str, Definition]:
    """Return the top-level definitions of all modules of a package, by their dotted names."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(source).body:
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")
            found[f"{module}.{name}"] = Definition(node, source.splitlines()[node.lineno - 2].removeprefix("# "))
    return found


def _entry(place: str, definition: Definition) -> Iterator[str]:
    node = definition.node
    yield f"### {place}\n"
    if isinstance(node, ast.Assign):
        yield f"`{ast.unparse(node)}`: {definition.comment}\n"
        return
    if isinstance(node, ast.FunctionDef):
        yield from _function(node)
        return
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    makers = [child for child in methods if child.name == "__init__" and ast.get_docstring(child)]
    arguments = _fields(node) or ", ".join(_arguments(maker) for maker in makers)
    if arguments:
        yield _code(f"{node.name}({arguments})")
    for documented in (node, *makers):
        yield _markdown(ast.get_docstring(documented) or "")
    for method in methods:
        if not method.name.startswith("_") and ast.get_docstring(method):
            yield from _function(method, prefix=".")


def _function(node: ast.FunctionDef, prefix: str = "") -> Iterator[str]:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    arguments = "" if decorators & {"property", "cached_property"} else f"({_arguments(node)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    shown = "".join(f"@{name}\n" for name in sorted(decorators & {"classmethod", "contextmanager"}))
    yield _code(f"{prefix}{node.name}{arguments}{returns}", shown)
    yield _markdown(ast.get_docstring(node) or "")


def _code(signature: str, decorators: str = "") -> str:
    return f"```python\n{decorators}{textwrap.fill(signature, 116, subsequent_indent='    ')}\n```\n"


def _arguments(node: ast.FunctionDef) -> str:
    return re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))


def _fields(node: ast.ClassDef) -> str:
    """Return a dataclass' fields as arguments; empty for another class."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return ""
    return ", ".join(_field(child) for child in node.body if isinstance(child, ast.AnnAssign))


def _field(node: ast.AnnAssign) -> str:
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        text = f"{options['default_factory']}()" if "default_factory" in options else options.get("default", "")
    else:
        text = ast.unparse(value) if value else ""
    return f"{node.target.id}: {ast.unparse(node.annotation)}" + (f"={text}" if text else "")


def _markdown(docstring: str) -> str:
    """Return a Google-style docstring as Markdown: its sections become lists."""
    text = re.sub(r"(:\w+:)?`+([^`]+)`+", r"`\2`", docstring)
    summary, *sections = _SECTION.split(text)
    parts = [summary.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        end = re.search(r"^\S", body, re.MULTILINE)
        section, rest = (body[: end.start()], body[end.start() :]) if end else (body, "")
        section = inspect.cleandoc(section)
        if title == "Returns":
            parts.append(f"Returns: {section}")
        else:
            items = re.sub(r"\n +", " ", section)
            parts.append(f"{title}:\n\n" + re.sub(r"^([^:\n]+): ", r"- `\1`: ", items, flags=re.MULTILINE))
        parts += [rest.strip()] if rest else []
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
