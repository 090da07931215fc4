"""Trained models to the model hub and from it: `push` and `pull`."""

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pixelclip.backbones import catalog
from pixelclip.backbones.sources import (
    REPOSITORY,
    RUN_FILES,
    NotInRepository,
    check_base,
    download,
    hub_in_reach,
    weight_file,
)
from pixelclip.checkpoint import ModelCard, read_card, read_state, write_checkpoint
from pixelclip.errors import ModelError

WEIGHTS, PAGE = RUN_FILES[0], "README.md"
LICENCES = {"MIT": "mit", "CC BY-NC 4.0": "cc-by-nc-4.0", "Apple AMLR (research)": "apple-amlr"}
# What the hub's client raises where a connection fails: requests' or httpx's, by its version.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

TEXT = """
# {title}

Segments photos by names given in words, with [pixelclip](https://pypi.org/project/pixelclip/):

```
pip install pixelclip
pixelclip segment PHOTO --classes "cat, sofa, window" --model hf-hub:{repo}
```

`pixelclip pull {repo} -o DIR` keeps a copy; in Python, `pixelclip.load_backbone("hf-hub:{repo}")`.

{training}

Licence of the weights: {licence}.
"""


def push(run: Path, repo: str, *, private: bool = False, dry_run: Path | None = None) -> str:
    """Upload a trained model with a page about it, as one commit; returns where it is.

    Args:
        run: run directory or weight file of ours.
        repo: owner/name; made if it is not there.
        private: only its owner may see it.
        dry_run: write what would be uploaded into this folder, and upload nothing.

    Raises:
        ModelError: there is no such model, no token, no network or no right to write there.
    """
    repo = _checked_name(repo)
    if dry_run is not None:
        write_folder(run, repo, dry_run)
        return str(dry_run)
    if get_token() is None:
        raise ModelError(
            "no token for the model hub: log in with hf auth login, or set HF_TOKEN; --dry-run DIR"
            " only writes the files"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_folder(run, repo, Path(folder))
        if not hub_in_reach():
            raise ModelError(f"cannot reach the model hub to push {repo}: no network")
        with _hub_errors(f"push {repo}"):
            return _upload(Path(folder), repo, private=private)


def write_folder(run: Path, repo: str, folder: Path) -> None:
    """Write what a repository of ours holds: the weights, and the page that the hub shows.

    Names of folders on this machine are cut from the card, which everybody can read.

    Raises:
        ModelError: there is no model of ours, or the folder cannot be written.
    """
    file = weight_file(run)
    card = read_card(file)
    if card is None:
        raise ModelError(f"{file} is no model of pixelclip; push takes a run directory")
    training = {key: _without_folders(value) for key, value in card.training.items()}
    card = card.model_copy(update={"name": repo, "training": training})
    write_checkpoint(folder / WEIGHTS, read_state(file), card)
    try:
        (folder / PAGE).write_text(model_page(card, repo), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot write {folder / PAGE}: {error.strerror or error}") from error


def model_page(card: ModelCard, repo: str) -> str:
    """The page of a model: metadata that the hub reads, and what a reader wants to know."""
    known = LICENCES.get(card.licence)
    unknown = card.licence in ("unknown", "not stated in the files")
    front = ModelCardData(
        license=known or ("unknown" if unknown else "other"),
        license_name=None if known or unknown else card.licence,
        library_name="pixelclip",
        pipeline_tag="image-segmentation",
        base_model=base_repository(card.base),
    )
    text = TEXT.format(
        title=repo.partition("/")[2], repo=repo, training=_training(card), licence=card.licence
    )
    return f"---\n{front.to_yaml()}\n---\n{text}"


def base_repository(base: str) -> str | None:
    """The hub repository of a public model name, or None."""
    if base in catalog.PUBLISHED:
        return catalog.PUBLISHED_REPO
    if base.startswith("hf-hub:"):
        return base.removeprefix("hf-hub:")
    architecture, _, tag = base.partition("/")
    if not tag:
        return None
    from open_clip.pretrained import get_pretrained_cfg

    repo, _, _ = str(get_pretrained_cfg(architecture, tag).get("hf_hub", "")).rpartition("/")
    return repo or None


def _training(card: ModelCard) -> str:
    """How a model was trained, as far as its card says."""
    settings = card.training.get("settings")
    if not isinstance(settings, dict):
        return "Its card does not say how it was trained."
    rows = [f"| {_cell(name)} | {_cell(json.dumps(value))} |" for name, value in settings.items()]
    lines = [
        f"Trained without labels, from {_cell(card.training.get('from'))}, on"
        f" {_cell(card.training.get('photos'))} photos and masks of what is in them, in"
        f" {_cell(card.training.get('step', settings.get('steps')))} steps"
        f" of {_cell(settings.get('batch_size'))} photos.",
        "",
        "| setting | value |",
        "| --- | --- |",
        *rows,
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A value as one cell of a table."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"


def _without_folders(value: object) -> object:
    """A value of a card with paths of this machine cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, str) and value and "\n" not in value and len(value) < 1024:
        path = Path(value)
        return path.name if path.is_absolute() or path.exists() else value
    return value


def _upload(folder: Path, repo: str, *, private: bool) -> str:
    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ModelError(f"{repo} is there already and public; give another name, or no --private")
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=[WEIGHTS, PAGE],
        commit_message="Add a model trained with pixelclip",
    )
    return f"{api.endpoint}/{repo}"


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """What the hub or the way there objects to, in one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ModelError(f"cannot {what}: HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the model hub does not accept the token",
            403: "the token has no right to write there",
            404: "the model hub has no such repository, or the token may not see it",
        }
        raise ModelError(f"cannot {what}: {reasons.get(status) or _line(error)}") from error
    except (OSError, RuntimeError, ValueError, _TRANSPORT_ERROR) as error:
        raise ModelError(f"cannot {what}: {_line(error.__cause__ or error)}") from error


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def _checked_name(repo: str) -> str:
    """A repository's full name.

    Raises:
        ModelError: it is none.
    """
    name = repo.removeprefix("hf-hub:")
    if not re.fullmatch(REPOSITORY, name):
        raise ModelError(f"{repo!r} is no name of a repository: write OWNER/NAME")
    return name


def pull(repo: str, folder: Path) -> ModelCard:
    """Fetch a model of ours with its page into a new folder, wholly or not at all.

    Raises:
        ModelError: no network, no such repository, its model is none of ours, or the folder is not
            empty or cannot be written.
    """
    repo = _checked_name(repo)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is there already and not empty; give another -o")
    weights = download(repo, WEIGHTS, newest=True)
    card = read_card(weights)
    if card is None:
        raise ModelError(f"hf-hub:{repo} is no model of pixelclip; --model hf-hub:{repo} may do")
    check_base(card, f"hf-hub:{repo}")
    files = {WEIGHTS: weights}
    with suppress(NotInRepository):  # a model without a page is a model
        files[PAGE] = download(repo, PAGE, newest=True)
    try:
        _place(files, folder)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
    return card


def _place(files: dict[str, Path], folder: Path) -> None:
    """Copy files beside the folder, then rename: it is never seen with half of them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        for name, source in files.items():
            shutil.copyfile(source, part / name)
        if folder.is_dir():
            folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
