"""Other ways to write a vocabulary: synonyms, plurals, templates, near-miss names."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixelclip.errors import ConfigError

SETS = ("name", "single", "imagenet-select", "imagenet")
SINGLE_TEMPLATES = ("a {}", "the {}", "photo of {}", "a photo of a {}.", "a photo of the {}.")
MAX_FILE_BYTES = 2**24

Kind = Literal["given", "template", "plural", "synonyms", "one synonym", "near misses"]


class Concept(BaseModel):
    """Words for one thing, and for things that are nearly it.

    Attributes:
        names: which mean the same.
        kinds: names of sorts and parts of the thing, and of what some labelled sets count as it;
            where the thing is a class, they are no near misses of any class.
        near: names of other things that look or sound alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = Field(min_length=1, max_length=1000)
    kinds: tuple[str, ...] = Field((), max_length=1000)
    near: tuple[str, ...] = Field((), max_length=1000)


class Thesaurus(BaseModel):
    """What is known of words.

    Attributes:
        plurals: of words that do not follow the rules.
        concepts: things and what they are called.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plurals: dict[str, str] = Field(default_factory=dict)
    concepts: tuple[Concept, ...] = Field((), max_length=100_000)

    def find(self, name: str) -> Concept:
        """The concept that a class name, or one of its synonyms, belongs to."""
        own = [self._places[part] for part in map(key, synonyms(name)) if part in self._places]
        return self.concepts[min(own)] if own else Concept(names=tuple(synonyms(name)))

    @cached_property
    def _places(self) -> dict[str, int]:
        """The first concept of each name."""
        places: dict[str, int] = {}
        for place, concept in enumerate(self.concepts):
            for name in concept.names:
                places.setdefault(key(name), place)
        return places


class Wording(NamedTuple):
    """One way to write a vocabulary.

    Attributes:
        kind: what is changed; only `one synonym` changes a single class. `synonyms` changes all
            names that have so many.
        label: the change in words.
        names: of the classes, in the data set's order; near misses follow them.
        templates: for `SegmentConfig.templates`; empty: as given.
        changed: index of the class that `one synonym` changes.
    """

    kind: Kind
    label: str
    names: tuple[str, ...]
    templates: str = ""
    changed: int | None = None


def changed_words(wording: Wording, classes: Sequence[str]) -> dict[str, str]:
    """The names that a wording changes, and by which words; names that it adds are none."""
    return {old: new for old, new in zip(classes, wording.names, strict=False) if old != new}


def load_thesaurus(path: Path | None = None) -> Thesaurus:
    """The thesaurus in a JSON file of the same form as data/thesaurus.json, which is the default.

    Raises:
        ConfigError: it cannot be read or is not of that form.
    """
    if path is None:
        text = files("pixelclip").joinpath("data/thesaurus.json").read_text("utf-8")
        return Thesaurus.model_validate_json(text)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"the thesaurus {path} is larger than 16 MiB")
        return Thesaurus.model_validate(json.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"cannot read the thesaurus {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"the thesaurus {path} is wrong at {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the thesaurus {path} is not JSON: {error}") from error


def key(name: str) -> str:
    """What two spellings of a name have in common."""
    return " ".join(name.casefold().split())


def synonyms(name: str) -> list[str]:
    """The parts of a class name between commas."""
    return [part.strip() for part in name.split(",")]


def plural(name: str, irregular: dict[str, str]) -> str:
    """The plural of a name's last word; every synonym's, where commas separate some.

    The background is no thing and has none.
    """
    if is_background(name):
        return name
    if "," in name:
        return ", ".join(plural(part, irregular) for part in synonyms(name))
    *before, last = name.split(" ")
    return " ".join([*before, irregular.get(last.casefold()) or _plural_by_rule(last)])


def _plural_by_rule(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return f"{word[:-1]}ies"
    if word.endswith("s") and not word.endswith(("ss", "us")):
        return word  # stairs, waterdrops
    return f"{word}es" if word.endswith(("s", "x", "z", "ch", "sh")) else f"{word}s"


def other_names(classes: Sequence[str], thesaurus: Thesaurus) -> list[list[str]]:
    """Per class the synonyms that no class of the vocabulary has yet."""
    taken = _taken(classes)
    return [
        []
        if is_background(name)
        else [other for other in thesaurus.find(name).names if key(other) not in taken]
        for name in classes
    ]


def near_misses(classes: Sequence[str], thesaurus: Thesaurus) -> list[str]:
    """Names of things that are none of the classes but near to one, each once.

    Left out is what names a class, or a sort of it, by the thesaurus or by its words: "wall" beside
    the class "wall-brick", "tile floor" beside "floor".
    """
    concepts = [thesaurus.find(name) for name in classes if not is_background(name)]
    # Sorts of "wall-brick" are those of a wall.
    roots = [thesaurus.find(name.partition("-")[0]) for name in classes]
    known = {
        key(name) for concept in (*concepts, *roots) for name in (*concept.names, *concept.kinds)
    }
    words = [_words(part) for name in classes for part in synonyms(name)]
    found: dict[str, str] = {}
    for concept in concepts:
        for name in concept.near:
            own = _words(name)
            if key(name) not in known and not any(own <= other or other <= own for other in words):
                found.setdefault(key(name), name)
    return list(found.values())


def is_background(name: str) -> bool:
    """Whether a class is the background, which stands for many things and for none."""
    return key(synonyms(name)[0]) == "background"


def _words(name: str) -> set[str]:
    return set(key(name).replace("-", " ").split())


def _taken(classes: Sequence[str]) -> set[str]:
    return {key(part) for name in classes for part in synonyms(name)}


def make_wordings(
    classes: Sequence[str], thesaurus: Thesaurus, templates: Sequence[str] = SETS + SINGLE_TEMPLATES
) -> list[Wording]:
    """All wordings of a vocabulary; the first is the one that is given.

    Args:
        classes: as given.
        thesaurus: synonyms and near misses.
        templates: sets and single templates to try.
    """
    given = tuple(classes)
    wordings = [Wording("given", "as given", given)]
    wordings += [Wording("template", text, given, text) for text in templates]
    others = other_names(classes, thesaurus)
    many = _distinct(given, [plural(name, thesaurus.plurals) for name in classes])
    if many != given:
        wordings.append(Wording("plural", "names in plural", many))
    for number in range(max(map(len, others))):
        wanted = [
            own[number] if number < len(own) else name
            for name, own in zip(given, others, strict=True)
        ]
        names = _distinct(given, wanted)
        changed = sum(name != old for name, old in zip(names, given, strict=True))
        if changed > 1:  # one name alone is tried below
            label = f"{changed} names by their synonym {number + 1}"
            wordings.append(Wording("synonyms", label, names))
    for index, (name, own) in enumerate(zip(given, others, strict=True)):
        for other in own:
            swapped = (*given[:index], other, *given[index + 1 :])
            wordings.append(Wording("one synonym", f"{name} → {other}", swapped, "", index))
    if near := near_misses(classes, thesaurus):
        wordings.append(Wording("near misses", f"{len(near)} near misses added", (*given, *near)))
    return wordings


def _distinct(given: tuple[str, ...], wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted names, but the given ones where two would coincide; all given ones if need be."""
    times = Counter(map(key, wanted))
    names = tuple(
        new if times[key(new)] == 1 else old for old, new in zip(given, wanted, strict=True)
    )
    return names if len(set(map(key, names))) == len(names) else given
