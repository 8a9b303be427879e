"""Which base models a page offers: those that are in the hub's cache, the miniature, and what somebody types."""

from hypernet.recipe import DEFAULT_BASE

MINIATURE = "testbed"


def known_bases(first: str = DEFAULT_BASE) -> list[tuple[str, str]]:
    """``(label, name)`` of each, the one to begin with first."""
    labels = {first: first, **{name: f"{name} (here)" for name in _cached()}}
    labels.setdefault(DEFAULT_BASE, f"{DEFAULT_BASE} (to be downloaded)")
    labels[MINIATURE] = "testbed (the bundled miniature)"
    return [(label, name) for name, label in labels.items()]


def _cached() -> list[str]:
    """Ids of the diffusers models in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(
        repository.repo_id
        for repository in repositories
        if repository.repo_type == "model"
        and any(file.file_name == "model_index.json" for revision in repository.revisions for file in revision.files)
    )


def check_base(name: str, is_local: bool) -> str:
    """The base that somebody chose or typed.

    Args:
        is_local: the page is for this machine alone; otherwise it opens nothing by its path.

    Raises:
        ValueError: there is none, or it is a path that must not be opened.
    """
    name = (name or "").strip()
    if not name:
        raise ValueError("no base model is chosen; choose one, or testbed, which is the bundled miniature")
    if not is_local and name not in [known for _, known in known_bases()]:
        raise ValueError(f"{name} is not in the list; other base models can be used only on localhost")
    return name
