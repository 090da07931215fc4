"""Other ways to write a vocabulary: synonyms, plurals, templates, near-miss names."""

import json
from collections.abc import Sequence
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
        near: names of other things that look or sound alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = Field(min_length=1, max_length=1000)
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
        own = {key(part) for part in synonyms(name)}
        for concept in self.concepts:
            if own & {key(other) for other in concept.names}:
                return concept
        return Concept(names=tuple(synonyms(name)))


class Wording(NamedTuple):
    """One way to write a vocabulary.

    Attributes:
        kind: what is changed; only `one synonym` changes a single class.
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
    """The plural of a name's last word; every synonym's, where commas separate some."""
    if "," in name:
        return ", ".join(plural(part, irregular) for part in synonyms(name))
    *before, last = name.split(" ")
    return " ".join([*before, irregular.get(last.casefold()) or _plural_by_rule(last)])


def _plural_by_rule(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "z", "ch", "sh")) else f"{word}s"


def other_names(classes: Sequence[str], thesaurus: Thesaurus) -> list[list[str]]:
    """Per class the synonyms that no class of the vocabulary has yet."""
    taken = _taken(classes)
    return [
        [other for other in thesaurus.find(name).names if key(other) not in taken]
        for name in classes
    ]


def near_misses(classes: Sequence[str], thesaurus: Thesaurus) -> list[str]:
    """Names of things that are none of the classes but near to one, each once."""
    concepts = [thesaurus.find(name) for name in classes]
    known = _taken(classes) | {key(name) for concept in concepts for name in concept.names}
    found: dict[str, str] = {}
    for concept in concepts:
        for name in concept.near:
            if key(name) not in known:
                found.setdefault(key(name), name)
    return list(found.values())


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
    many = tuple(plural(name, thesaurus.plurals) for name in classes)
    if len({key(name) for name in many}) == len(many):
        wordings.append(Wording("plural", "all names in plural", many))
    for number in range(max(map(len, others))):
        names = [
            own[number] if number < len(own) else name
            for name, own in zip(given, others, strict=True)
        ]
        if len({key(name) for name in names}) == len(names):
            label = f"all names by their synonym {number + 1}"
            wordings.append(Wording("synonyms", label, tuple(names)))
    for index, (name, own) in enumerate(zip(given, others, strict=True)):
        for other in own:
            names = [*given[:index], other, *given[index + 1 :]]
            wordings.append(Wording("one synonym", f"{name} → {other}", tuple(names), "", index))
    if near := near_misses(classes, thesaurus):
        wordings.append(Wording("near misses", f"{len(near)} near misses added", (*given, *near)))
    return wordings
