"""Which photo's masks lie in which shard: a store grows by rounds, none of them is made twice."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixelclip.errors import DataError
from pixelclip.jobs.work import Piece, cut
from pixelclip.masks.names import photo_name
from pixelclip.masks.store import (
    MANIFEST,
    read_manifest,
    shard_failures,
    shard_path,
    shard_photos,
    write_manifest,
)
from pixelclip.photos import Photo

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
    """All shards of a store with their photos; the store's manifest is written or compared.

    Args:
        out: folder of the store.
        photos: sorted by name.
        source: what makes the masks.
        settings: all that decides what it makes.
        shard_size: photos per shard of a new round; by their number if it is not given.

    Raises:
        DataError: there is a store of another source or other settings, or one that was begun
            with other photos and is not finished.
    """
    made_by = {"source": source, "settings": json.loads(json.dumps(dict(settings)))}
    rounds: list[Round] = []
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        _compare(out, manifest, made_by)
        rounds = _rounds(out, manifest)
    elif any(out.glob("shard-*.parquet")):
        raise DataError(f"{out} holds shards without {MANIFEST}; choose another folder")
    left = {photo_name(photo): photo for photo in photos}
    there = [_names(out, one) for one in rounds]
    pieces: list[Piece] = []
    for number, one in enumerate(rounds):
        elsewhere = {name for i, names in enumerate(there) if i != number for name in names}
        if all(shard_path(out, index).exists() for index in one.shards()):
            pieces += _finished(out, one, left)
            own = there[number]
        else:
            own = {name for name in left if name not in elsewhere}
            if _sha256(own) != one.photos_sha256:
                raise DataError(
                    f"{out} is not finished and was begun with other photos: {one.photos}, now"
                    f" {len(own)}; finish it with those first, or choose another folder"
                )
            members = [left[name] for name in sorted(own)]
            pieces += cut(members, one.shard_size, one.first_shard)
        left = {name: photo for name, photo in left.items() if name not in own}
    if left:
        first = rounds[-1].shards().stop if rounds else 0
        rounds.append(_new_round(left, shard_size, first))
        listed = [one.model_dump() for one in rounds]
        write_manifest(out, {**made_by, "rounds": listed})
        pieces += cut(list(left.values()), rounds[-1].shard_size, first)
    return pieces


def _names(out: Path, one: Round) -> set[str]:
    """The photos of a round that are done, be it with failure."""
    paths = [path for index in one.shards() if (path := shard_path(out, index)).exists()]
    return {name for path in paths for name in _shard_names(path)}


def _shard_names(path: Path) -> list[str]:
    return sorted({*shard_photos(path), *(name for name, _ in shard_failures(path))})


def _finished(out: Path, one: Round, photos: Mapping[str, Photo]) -> list[Piece]:
    """The shards of a finished round with those of their photos that are still there."""
    pieces = []
    for index in one.shards():
        names = _shard_names(shard_path(out, index))
        own = tuple(photos[name] for name in names if name in photos)
        pieces += [Piece(index, own)] if own else []
    return pieces


def _new_round(photos: Mapping[str, Photo], shard_size: int | None, first: int) -> Round:
    size = shard_size or min(max(-(-len(photos) // SHARDS), MIN_SHARD), MAX_SHARD)
    return Round(
        photos=len(photos),
        photos_sha256=_sha256(photos),
        shard_size=size,
        first_shard=first,
        versions=dict(filter(None, map(_version, PACKAGES))),
    )


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None


def _sha256(names: Mapping[str, Photo] | set[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()


def _rounds(out: Path, manifest: Mapping[str, object]) -> list[Round]:
    try:
        listed = manifest["rounds"]
        if not isinstance(listed, list) or not listed:
            raise ValueError
        rounds = [Round.model_validate(one) for one in listed]
        if sum(len(one.shards()) for one in rounds) > MAX_SHARDS:
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
