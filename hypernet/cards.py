"""Model cards of LoRAs and hypernetworks for the Hugging Face hub, and bringing both there.

Everything that a card says is read from the files: their metadata, sidecar and pictures.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import describe
from converters.sidecar import is_our_picture, read_sidecar
from hypernet.errors import first_line
from hypernet.hub import HYPERNETWORK_FILES, split_revision
from hypernet.network.hypernetwork import read_config
from hypernet.request import sheet_path, steps_sheet_path
from lidb_peft.files import atomic_path
from lidb_peft.safe_read import printable

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

CONSENT = (
    "The person in these pictures has agreed to this LoRA and to its publication. Do not use it for what they would not"
    " agree to, and do not pass off what it draws as photographs."
)
NO_CONSENT = (
    "This LoRA makes pictures of a real person. Nothing is said here of their consent to its publication: keep it"
    " private, and ask them first."
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = "README.md"
_OURS = "lidb-peft"  # a tag, which every card of ours has
_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ body }}
"""


@dataclass(frozen=True)
class Share:
    """What goes to the hub.

    Attributes:
        card: the text of README.md.
        files: what is uploaded beside it: file -> its name there.
    """

    card: "ModelCard"
    files: dict[Path, str]


def share(source: str | Path, base: str = "", license: str = "", consent: bool = False) -> Share:
    """Make the card of a LoRA file or of a hypernetwork's folder; see `share_lora` and `share_hypernetwork`."""
    make = share_hypernetwork if Path(source).is_dir() else share_lora
    return make(source, base, license, consent)


def card_path(source: Path) -> Path:
    """Where the card is written here: beside a LoRA, ``me.md``, or in a hypernetwork's folder."""
    return source / _CARD if source.is_dir() else source.with_suffix(".md")


def share_lora(
    lora: str | Path, base: str = "", license: str = "", consent: bool = False, how: Sequence[str] = ()
) -> Share:
    """Make the card of a LoRA file, and choose what goes with it.

    Args:
        base: the id of the base model on the hub; "" says only what the LoRA's metadata say.
        license: by the hub's names, such as ``creativeml-openrail-m``; "" is none.
        consent: the person has agreed to the publication.
        how: how it was made, in sentences, beside what its metadata say.

    Raises:
        ValueError, OSError: the file is not a LoRA, or cannot be read.
    """
    from huggingface_hub import ModelCardData

    lora = Path(lora)
    description = describe(lora)
    if not description.kind.endswith((" LoRA", " DoRA")):
        raise ValueError(f"{lora} is a {description.kind}; only a LoRA or a hypernetwork's folder can be shared")
    trigger = next(iter(description.trigger_words), "")
    pictures = _pictures_of(lora)
    title = description.title or lora.stem
    data = ModelCardData(
        base_model=base or None,
        library_name="diffusers",
        license=license or None,
        pipeline_tag="text-to-image",
        tags=["lora", "text-to-image", "diffusers", "template:sd-lora", _OURS],
        widget=[{"text": trigger or title, "output": {"url": picture.name}} for picture in pictures[:1]] or None,
        instance_prompt=trigger or None,
    )
    facts = {
        "Base model": base or description.base_model_name or description.base or "not said",
        "Trigger": f"`{trigger}`" if trigger else "none",
        "Rank": ", ".join(f"{rank:g}" for rank in description.ranks),
        "Photos": description.metadata.get("ss_num_train_images", "not said"),
        "Resolution": description.metadata.get("ss_resolution", "not said"),
        "Hash (Automatic1111)": description.hashes["a1111"],
    }
    files = {lora: lora.name, **{picture: picture.name for picture in pictures}}
    if read_sidecar(lora):
        files[lora.with_suffix(".json")] = lora.with_suffix(".json").name
    body = "\n\n".join([
        f"A LoRA of {description.base or 'a diffusion model'}, made with "
        "[lidb-peft](https://arxiv.org/abs/2307.06949) (HyperDreamBooth for the LoRA ecosystem).",
        "\n".join(f"![{picture.stem}]({picture.name})" for picture in pictures),
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
        *_how_it_was_made(how),
        "## Use\n\n```python\npipeline.load_lora_weights("
        f"\"OWNER/NAME\", weight_name={json.dumps(lora.name)})\npipeline({json.dumps(trigger or 'a prompt')})\n```\n\n"
        f"In Automatic1111 and Forge: put `{lora.name}` into `models/Lora` and write "
        f"`{trigger} <lora:{lora.stem}:1>`; in ComfyUI: into `models/loras`.",
        f"## Consent and likeness\n\n{CONSENT if consent else NO_CONSENT}",
    ])  # fmt: skip
    return Share(_card(data, title, body), files)


def share_hypernetwork(
    folder: str | Path, base: str = "", license: str = "", consent: bool = False, how: Sequence[str] = ()
) -> Share:
    """As `share_lora`, for the folder of a hypernetwork.

    Args:
        consent: the people whose photos it was trained on have agreed.
    """
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    config = read_config(folder)
    trigger = config.trigger
    said_base = str(config.record.get("base_model_name", ""))
    data = ModelCardData(
        base_model=base or None,
        library_name=_OURS,
        license=license or None,
        pipeline_tag="image-to-image",
        tags=["hyperdreambooth", "hypernetwork", "lora", "personalization", _OURS],
        instance_prompt=trigger,
    )
    said = (
        "The people whose photos it was trained on have agreed to that."
        if consent
        else "Nothing is said here of the consent of the people whose photos it was trained on."
    )
    facts = {
        "Base model": base or said_base or "not said",
        "Prompt": f"`{trigger}`",
        "Layers": len(config.layers),
        "Refinements (k)": config.k,
        "Encoder": f"{config.encoder.model_type}, {config.image_size} px",
        "Bases": "learned" if config.learned_bases else "frozen",
    }
    body = "\n\n".join([
        "Predicts from one photo the weights of a LoRA of its person, as HyperDreamBooth "
        "([arXiv:2307.06949](https://arxiv.org/abs/2307.06949)) does.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
        *_how_it_was_made(how),
        "## Use\n\n```sh\nhdb personalize me.jpg --hypernet OWNER/NAME\n```",
        f"## Consent and likeness\n\n{said} Make LoRAs only of yourself, or of people who have agreed to it.",
    ])  # fmt: skip
    wanted = [path for pattern in HYPERNETWORK_FILES for path in sorted(folder.glob(pattern))]
    return Share(_card(data, folder.resolve().name, body), {path: path.name for path in wanted})


def write_card(shared: Share, path: Path) -> Path:
    """Write the card where there is none yet; one that is there, edited perhaps, stays and is what is uploaded.

    Raises:
        FileExistsError: what is there is no card of ours.
        OSError: it cannot be written.
    """
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(str(shared.card), encoding="utf-8")
    elif _OURS not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{path} is not a model card of lidb-peft's and is kept; rename it")
    return path


def hub_id(base: str) -> str:
    """The id on the hub of a base or data set named on the command line; "" for a file, a folder or a bundled one."""
    return "" if Path(base).exists() or "/" not in base else split_revision(base)[0]


def check_repository(name: str) -> None:
    """Raise ValueError unless ``name`` is one of a repository."""
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{printable(name)!r} is not the name of a repository; write OWNER/NAME")


def push(shared: Share, card: Path, repository: str, private: bool = True, api: "HfApi | None" = None) -> str:
    """Upload the files of ``shared``, and ``card`` as README.md, in one commit; returns the URL of the repository.

    Args:
        private: of a repository that is made for it; one that is there stays as it is.
        api: talks to the hub; by default with the token of ``hf auth login``.

    Raises:
        ValueError: ``repository`` is no id.
        OSError: the hub cannot be reached, or does not let us write; the files stay where they are.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    text = card.read_text(encoding="utf-8").replace("OWNER/NAME", repository)
    operations = [CommitOperationAdd(path_in_repo=_CARD, path_or_fileobj=text.encode())]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for path, name in shared.files.items()]
    api = api or HfApi()
    try:
        url = api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Upload {', '.join(shared.files.values())}")
    except Exception as error:
        kept = ", ".join(map(str, [*shared.files, card]))
        raise OSError(f"{_why_not_pushed(error, repository)}; nothing is lost: {kept} stay here") from error
    return str(url)


def _why_not_pushed(error: Exception, repository: str) -> str:
    """The reason in a sentence; what is no failure of the hub or of the connection is raised as it is."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "the Hugging Face hub does not know who you are, or your token has expired; run hf auth login"
    if status == 403:
        return f"your token may not write to {repository}; take one with write access, or another name"
    if isinstance(error, HfHubHTTPError | HTTPError | OfflineModeIsEnabled | OSError):
        return f"the Hugging Face hub cannot be reached, or refuses ({first_line(error)})"
    raise error


def _how_it_was_made(how: Sequence[str]) -> list[str]:
    return ["## How it was made\n\n" + " ".join(how)] if how else []


def _pictures_of(lora: Path) -> list[Path]:
    """Our pictures beside a LoRA: its preview and its sheets; nobody's photo."""
    names = [lora.with_suffix(".png"), lora.with_suffix(".preview.png"), sheet_path(lora), steps_sheet_path(lora)]
    return [path for path in names if is_our_picture(path)]


def _card(data: Any, title: str, body: str) -> "ModelCard":
    from huggingface_hub import ModelCard

    return ModelCard.from_template(data, template_str=_TEMPLATE, title=_cell(title), body=body)


def _cell(value: object) -> str:
    return printable(str(value), 200).replace("|", "\\|").replace("\n", " ")
