"""Names of the families for help texts.

They are listed in `lidb_peft.families` alone. Importing that as usual would import `lidb_peft` and torch, which takes
seconds, and help must be instant; so the package of families, which imports nothing heavy, is loaded by its path.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def family_names() -> tuple[str, ...]:
    """Names in `lidb_peft.families.FAMILIES`, from that package loaded on its own."""
    found = find_spec("lidb_peft")  # imports nothing for a top-level package
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).with_name("families")
    spec = spec_from_file_location("_families", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.FAMILIES)
