"""Which photo's masks lie in which shard: a store grows by rounds, none of them is made twice."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixelclip.errors import DataError
from pixelclip.jobs.work import Piece
from pixelclip.masks.names import photo_name
from pixelclip.masks.store import (
    MANIFEST,
    read_manifest,
    read_names,
    write_manifest,
    write_names,
)
from pixelclip.photos import Photo

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module that is not there

PACKAGES = ("pixelclip", "numpy", "pillow", "scikit-image", "torch", "timm", "transformers",
            "pyarrow")  # fmt: skip
MAX_SHARDS = 10**6  # of a store; each is looked for
MIN_SHARD, MAX_SHARD, SHARDS = 8, 256, 64  # photos, photos, and how many where these allow it


class Round(BaseModel):
    """Photos that came together, in the order of their names, and their shards.

    Attributes:
        photos: how many.
        photos_sha256: of the JSON list of their names.
        shard_size: photos per shard; the last has the rest.
        first_shard: number of the first shard.
        versions: of the packages that made it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    photos: int = Field(ge=1, le=10**9)
    photos_sha256: str
    shard_size: int = Field(ge=1, le=10**9)
    first_shard: int = Field(ge=0, le=10**9)
    versions: dict[str, str] = {}

    def shards(self) -> range:
        """The numbers of its shards."""
        return range(self.first_shard, self.first_shard - (-self.photos // self.shard_size))


def claim(
    out: Path,
    photos: Sequence[Photo],
    *,
    source: str,
    settings: Mapping[str, object],
    shard_size: int | None = None,
) -> list[Piece]:
    """The shards of a store with their photos; the store's manifest is written or compared.

    A photo that is gone is left out; one that no round has is in a further round.

    Args:
        out: folder of the store.
        photos: sorted by name.
        source: what makes the masks.
        settings: all that decides what it makes.
        shard_size: photos per shard of a new round; by their number if it is not given.

    Raises:
        DataError: there is a store of another source or other settings, or a damaged one.
    """
    made_by = {"source": source, "settings": json.loads(json.dumps(dict(settings)))}
    left = {photo_name(photo): photo for photo in photos}
    pieces: list[Piece] = []
    with _alone(out):
        rounds = _rounds_there(out, made_by)
        for one in rounds:
            pieces += _pieces(one, _read_names(out, one), left)
        if left:
            first = rounds[-1].shards().stop if rounds else 0
            names = sorted(left)
            rounds.append(_new_round(names, shard_size, first))
            write_names(_names_path(out, rounds[-1]), names)
            listed = [one.model_dump() for one in rounds]
            write_manifest(out, {**made_by, "rounds": listed})
            pieces += _pieces(rounds[-1], names, left)
    return pieces


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While one command reads and writes the manifest, another one on this machine waits."""
    with ExitStack() as stack:
        if fcntl is not None:
            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def _rounds_there(out: Path, made_by: Mapping[str, object]) -> list[Round]:
    """The rounds of the store in that folder; none if there is no store, or no mask in it yet."""
    is_begun = any(out.glob("shard-*.parquet"))
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if is_begun or all(manifest.get(key) == value for key, value in made_by.items()):
            _compare(out, manifest, made_by)
            return _rounds(out, manifest)
        for path in out.glob("photos-*.parquet"):  # of a command that came to nothing
            path.unlink()
        return []
    if is_begun:
        raise DataError(f"{out} holds shards without {MANIFEST}; choose another folder")
    return []


def _pieces(one: Round, names: list[str], left: dict[str, Photo]) -> list[Piece]:
    """The shards of a round with those of its photos that are there; they are taken from `left`."""
    pieces = []
    for index in one.shards():
        at = (index - one.first_shard) * one.shard_size
        own = names[at : at + one.shard_size]
        photos = tuple(left.pop(name) for name in own if name in left)
        pieces += [Piece(index, photos)] if photos else []
    return pieces


def _names_path(out: Path, one: Round) -> Path:
    return out / f"photos-{one.first_shard:05d}.parquet"


def _read_names(out: Path, one: Round) -> list[str]:
    """The photos of a round, sorted.

    Raises:
        DataError: they are not those that the manifest tells.
    """
    path = _names_path(out, one)
    names = read_names(path, one.photos)
    if _sha256(names) != one.photos_sha256:
        raise DataError(f"{path} is damaged: other photos than the manifest says")
    return names


def _new_round(names: list[str], shard_size: int | None, first: int) -> Round:
    size = shard_size or min(max(-(-len(names) // SHARDS), MIN_SHARD), MAX_SHARD)
    return Round(
        photos=len(names),
        photos_sha256=_sha256(names),
        shard_size=size,
        first_shard=first,
        versions=dict(filter(None, map(_version, PACKAGES))),
    )


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None


def _sha256(names: list[str]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _rounds(out: Path, manifest: Mapping[str, object]) -> list[Round]:
    try:
        listed = manifest["rounds"]
        if not isinstance(listed, list) or not listed:
            raise ValueError
        rounds = [Round.model_validate(one) for one in listed]
        starts = [0, *(one.shards().stop for one in rounds)]
        if starts[:-1] != [one.first_shard for one in rounds] or starts[-1] > MAX_SHARDS:
            raise ValueError
        return rounds
    except (KeyError, ValueError, ValidationError) as error:
        raise DataError(
            f"{out / MANIFEST} does not say which photos it is of; choose another folder"
        ) from error


def _compare(out: Path, manifest: Mapping[str, object], made_by: Mapping[str, object]) -> None:
    """Make sure that the store there is made by the same source with the same settings."""
    for key, value in made_by.items():
        there = manifest.get(key)
        if there == value:
            continue
        if isinstance(there, dict) and isinstance(value, dict):
            names = [name for name in {**there, **value} if there.get(name) != value.get(name)]
            key, there, value = names[0], there.get(names[0]), value.get(names[0])
        raise DataError(
            f"{out} holds masks with other {key} ({there!r}, now {value!r}); choose another folder"
        )
