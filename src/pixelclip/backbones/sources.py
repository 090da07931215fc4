"""From a model's name to its card and its weights: hub, file, run directory."""

import hashlib
import json
import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from pixelclip.backbones import catalog
from pixelclip.checkpoint import (
    ModelCard,
    State,
    cache_dir,
    read_card,
    read_json,
    read_state,
    write_safetensors,
)
from pixelclip.errors import ModelError

log = logging.getLogger("pixelclip")

WEIGHT_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin"}
RUN_FILES = ("model.safetensors",)
HUB_CONFIG = "open_clip_config.json"
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # open_clip's tags look the same
CLIP_PREFIX = "sem_seg_head.predictor.clip_model."
DEAD_PREFIXES = ("teacher_encoder.", "head.", "dino.", "sem_seg_head.predictor.prompt_tokens")


class Source(NamedTuple):
    """A model that was found: its card, how to read its tensors, where they come from."""

    card: ModelCard
    read: Callable[[], State | None]
    origin: str


def text_base(name: str, checkpoint: Path | None, card: ModelCard) -> str:
    """Name under which a model's text tower can be had anywhere, or empty.

    The offline model's comes from a package, weights in files of the user's have no name.
    """
    if card.base or card.family == "mini":
        return card.base
    private = checkpoint is not None or Path(name).exists()
    return "" if private else name


def resolve(name: str, *, weights_wanted: bool = True) -> Source:
    """Find a model by name, file or folder.

    Args:
        name: see `load_backbone`.
        weights_wanted: False when other weights replace the named ones: nothing is downloaded
            and an architecture without a tag will do.

    Raises:
        ModelError: there is no such model, or it cannot be used.
    """
    if not name.strip():
        raise ModelError("no model name; see pixelclip models")
    if name in catalog.LOCAL:
        from pixelclip.backbones import mini

        return Source(mini.card(), mini.read, str(mini.WEIGHTS))
    if name in catalog.PUBLISHED:
        return _published(name)
    path = Path(name)
    if path.is_dir() or (path.suffix in WEIGHT_SUFFIXES and path.is_file()):
        return _local(path)
    if name.startswith("hf-hub:"):
        return _from_hub(name)
    if path.suffix in WEIGHT_SUFFIXES:
        raise ModelError(f"no such weight file: {name}")
    return _by_tag(name, weights_wanted=weights_wanted)


def _published(name: str) -> Source:
    """One of the authors' models (behaviour.md 20)."""
    published = catalog.PUBLISHED[name]
    card = catalog.open_clip_card(published.architecture, None).model_copy(
        update={
            "name": name,
            "activation": published.activation,
            "licence": catalog.licence(name),
        }
    )

    def read() -> State:
        return read_any(download(catalog.PUBLISHED_REPO, published.filename), card)

    return Source(card, read, f"{catalog.PUBLISHED_REPO}/{published.filename}")


def _by_tag(name: str, *, weights_wanted: bool) -> Source:
    """`ViT-B-16/openai`: an open_clip architecture and the tag of its weights."""
    architecture, _, tag = name.partition("/")
    card = catalog.open_clip_card(architecture, tag or None)
    if not tag and weights_wanted:
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ModelError(
            f"{architecture} is an architecture: name its weights too, as in"
            f" {architecture}/{(tags or ['TAG'])[0]} (available: {', '.join(tags) or 'none'}),"
            " or give --checkpoint FILE"
        )

    def read() -> State:
        from open_clip.pretrained import get_pretrained_cfg

        found = str(get_pretrained_cfg(architecture, tag).get("hf_hub", ""))
        if not found:
            raise ModelError(f"{name} is not on the model hub; give --checkpoint FILE")
        repo, _, filename = found.rpartition("/")
        return read_state(_first_of(repo, (filename,) if filename else HUB_FILES))

    return Source(card, read, name)


def _from_hub(name: str) -> Source:
    """`hf-hub:org/repo`: an open_clip model in a hub repository, or one that `push` put there."""
    repo = name.removeprefix("hf-hub:")
    found = _first_of(repo, (HUB_CONFIG, RUN_FILES[0]))
    if found.name == RUN_FILES[0]:
        card = read_card(found)
        if card is not None:
            check_base(card, name)
            card = card.model_copy(update={"name": name})
            return Source(card, lambda: read_state(found), name)
        found = download(repo, HUB_CONFIG)  # other libraries name their weights so too
    card = _config_card(name, read_json(found))
    return Source(card, lambda: read_state(_first_of(repo, HUB_FILES)), name)


def check_base(card: ModelCard, origin: object) -> None:
    """Make sure that a foreign card names its base publicly: no file here is opened for it.

    Raises:
        ModelError: the base is no public name.
    """
    base = card.base
    public = base in catalog.PUBLISHED or re.fullmatch(REPOSITORY, base.removeprefix("hf-hub:"))
    if base and (not public or Path(base).exists() or Path(base).suffix in WEIGHT_SUFFIXES):
        raise ModelError(f"{origin} has a broken card: base: {base!r} is no public model")


def _config_card(name: str, config: dict[str, object]) -> ModelCard:
    """Card from the `open_clip_config.json` that stands beside weights."""
    model, pixels = config.get("model_cfg"), config.get("preprocess_cfg") or {}
    if not isinstance(model, dict) or not isinstance(pixels, dict):
        raise ModelError(f"{name}: open_clip_config.json has no model_cfg")
    if reason := catalog.refusal(model):
        raise ModelError(f"{name} cannot segment here: {reason}; see pixelclip models")
    activation = "quickgelu" if model.get("quick_gelu") else "gelu"
    try:
        return catalog.make_card(name, model, activation=activation, pixels=pixels)
    except ValueError as error:
        raise ModelError(f"{name}: open_clip_config.json is not usable: {error}") from error


def _local(path: Path) -> Source:
    """A weight file, a run directory of ours, or a folder that open_clip saved."""
    if path.is_dir() and not (path / RUN_FILES[0]).is_file():
        if (path / "open_clip_config.json").is_file():
            config = read_json(path / "open_clip_config.json")
            weights = next((path / n for n in HUB_FILES if (path / n).is_file()), None)
            if weights is None:
                raise ModelError(f"{path} has no weights ({' or '.join(HUB_FILES)})")
            found = weights
            return Source(_config_card(str(path), config), lambda: read_state(found), str(found))
        raise ModelError(f"{path} is not a run directory: it has no {RUN_FILES[0]}")
    file = weight_file(path)
    card = read_card(file)
    if card is not None:
        return Source(card, lambda: read_state(file), str(file))
    name = _authors_model(file)
    if name is None:
        raise ModelError(
            f"{file} does not say which model it is of; name it too, as in"
            f" --model ViT-B-16/openai --checkpoint {file}"
        )
    card = _published(name).card.model_copy(update={"name": str(file)})
    return Source(card, lambda: read_any(file, card), str(file))


def weight_file(path: Path) -> Path:
    """The weight file of a path: itself, or the one in a folder of ours or of open_clip.

    Raises:
        ModelError: there is none.
    """
    if path.is_dir():
        names = (*RUN_FILES, *HUB_FILES)
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise ModelError(f"no such weight file: {path}")
    return path


def _authors_model(path: Path) -> str | None:
    """Name of the authors' model a file holds, told by its keys, or None."""
    state = _converted(path)
    if state is None:
        state = read_state(path)
        if not any(key.startswith(CLIP_PREFIX) for key in state):
            return None
    return "pixelclip-convnext-b" if _is_convnext(state) else "pixelclip-vit-b16"


def _is_convnext(state: State) -> bool:
    """Whether the authors' tensors, converted or not, are those of their ConvNeXt."""
    return any("visual.trunk." in key for key in state)


def _converted_path(path: Path) -> Path:
    """Where the converted copy of an authors' file lies, told by the file's size and time."""
    stat = path.resolve().stat()
    identity = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_dir() / "converted" / f"{path.stem}-{key}.safetensors"


def _converted(path: Path) -> State | None:
    """The converted copy of an authors' file, or None; a damaged one is passed over."""
    converted = _converted_path(path)
    if not converted.is_file():
        return None
    try:
        return read_state(converted)
    except ModelError as error:
        log.info("made again: %s", error)
        return None


def read_any(path: Path, card: ModelCard) -> State:
    """Tensors of a weight file under our names; a file of the authors is converted once.

    The converted copy lies in the cache as safetensors, so that later loads neither unpickle
    nor read the half of the file that inference does not need (behaviour.md 20c).

    Raises:
        ModelError: the file cannot be read, or is the authors' but of another activation.
    """
    state = _converted(path)
    if state is not None:
        _check_activation(path, card, convnext=_is_convnext(state))
        return state
    state = read_state(path)
    if not any(name.startswith(CLIP_PREFIX) for name in state):
        return state
    _check_activation(path, card, convnext=_is_convnext(state))
    state = strip_authors(state, path)
    try:
        write_safetensors(_converted_path(path), state, {"format": "pt", "source": path.name})
    except OSError as error:
        log.info("not cached: %s", error)
    return state


def _check_activation(path: Path, card: ModelCard, *, convnext: bool) -> None:
    """The authors' ViT computes QuickGELU, their ConvNeXt's text tower GELU."""
    activation = "gelu" if convnext else "quickgelu"
    if card.activation != activation:
        raise ModelError(
            f"{path} is a PixelCLIP trained with {activation}, but {card.name} computes"
            f" {card.activation}; use --model {path} alone"
        )


def strip_authors(state: State, path: Path) -> State:
    """The CLIP inside a checkpoint of the authors; what inference does not need is dropped."""
    kept = {
        key.removeprefix(CLIP_PREFIX): value.contiguous()
        for key, value in state.items()
        if key.startswith(CLIP_PREFIX)
    }
    dropped = [key for key in state if key.startswith(DEAD_PREFIXES)]
    log.info("%s: %d tensors used, %d not needed and dropped", path.name, len(kept), len(dropped))
    strange = sorted(set(state) - set(dropped) - {CLIP_PREFIX + key for key in kept})
    fixed = ("pixel_mean", "pixel_std", "clip_pixel_mean", "clip_pixel_std")
    strange = [key for key in strange if key not in fixed]
    if strange:
        raise ModelError(f"{path} has tensors without a place: {', '.join(strange[:3])}")
    return kept


class NotInRepository(ModelError):
    """The hub was reached, and has no such file."""


def _first_of(repo: str, filenames: tuple[str, ...]) -> Path:
    """The first of several files that a hub repository has."""
    for filename in filenames:
        cached = try_to_load_from_cache(repo, filename)
        if isinstance(cached, str):
            return Path(cached)
    for filename in filenames[:-1]:
        try:
            return download(repo, filename)
        except NotInRepository:
            continue
    return download(repo, filenames[-1])


def download(repo: str, filename: str, *, newest: bool = False) -> Path:
    """A file of a hub repository, from the hub's cache where it is there already.

    Args:
        repo: organisation/name.
        filename: in the repository.
        newest: ask the hub, where it is in reach, whether the cached one is still right.

    Raises:
        ModelError: no network, no such repository or file.
    """
    try:
        cached = try_to_load_from_cache(repo, filename)
        if isinstance(cached, str) and not (newest and hub_in_reach()):
            return Path(cached)
        if not hub_in_reach():
            raise LocalEntryNotFoundError("the hub's address cannot be found")
        return Path(hf_hub_download(repo, filename))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"cannot fetch {repo}/{filename}: no network and not in the cache; give"
            " --checkpoint FILE, or use --model mini, which needs none"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise NotInRepository(f"the model hub has no {repo}/{filename}") from error
    except (HfHubHTTPError, OSError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot fetch {repo}/{filename}: {line[:160]}") from error


def hub_in_reach() -> bool:
    """Whether the hub's name resolves; the hub's client would retry for half a minute.

    Behind a proxy names need not resolve here, so there the client itself finds out.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
