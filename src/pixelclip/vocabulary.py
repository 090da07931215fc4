"""Class names to text features: templates, synonyms, ensembling, a cache on disk."""

import contextlib
import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pixelclip import __version__
from pixelclip.backbones import Backbone, Text
from pixelclip.checkpoint import cache_dir, read_state, write_safetensors
from pixelclip.errors import ConfigError, ModelError

SINGLE = ("A photo of a {} in the scene",)

# In the order of the authors' list, on which their per-template features depend.
IMAGENET_SELECT = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "A photo of a {} in the scene",
)

MINI = (
    "a photo of a {}.",
    "a photo of the {}.",
    "there is a {} in the scene.",
    "a close-up photo of a {}.",
    "a photo of many {}.",
    "{}",
)

TEXTS_PER_CALL = 256
CLASS_SUFFIXES = {".txt", ".csv", ".json"}
TEMPLATES_FORMAT = "pixelclip-templates"
OWN = "\t"  # "sofa\ta photo of a {}" is for the class sofa alone; no class name holds a tab


@cache
def template_sets() -> dict[str, tuple[str, ...]]:
    """The built-in template sets by name."""
    text = files("pixelclip").joinpath("data/imagenet_templates.txt").read_text("utf-8")
    imagenet = tuple(line for line in text.splitlines() if line)
    return {"single": SINGLE, "imagenet-select": IMAGENET_SELECT, "imagenet": imagenet,
            "mini": MINI, "name": ("{}",)}  # fmt: skip


@cache
def class_lists() -> dict[str, tuple[str, ...]]:
    """The built-in class lists by name, spelled as their protocols spell them."""
    text = files("pixelclip").joinpath("data/class_names.json").read_text("utf-8")
    return {name: tuple(names) for name, names in json.loads(text).items()}


def parse_templates(text: str, *, of_classes: bool = False) -> tuple[str, ...]:
    """Templates from the name of a built-in set or from a file with one per line.

    Args:
        text: name or file.
        of_classes: templates may be of single classes, as a file of `pixelclip templates` has
            them: before them stand the class's name and a tab.

    Raises:
        ConfigError: neither exists, or a template has no `{}` or more than one.
    """
    templates = _templates(text)
    if not of_classes and any(OWN in template for template in templates):
        raise ConfigError(
            f"{text} holds templates of single classes, which serve segment and eval alone; give"
            " templates for all"
        )
    return templates


def _templates(text: str) -> tuple[str, ...]:
    if text in template_sets():
        return template_sets()[text]
    if "{}" in text:
        return check_templates((text,), "--templates")
    path, what, known = Path(text), "template set", tuple(template_sets())
    if path.suffix == ".json" and isinstance(document := _json(path, what, known), dict):
        return _own_templates(document, path)
    lines = _lines(path, what, known)
    return check_templates(tuple(line.strip() for line in lines if line.strip()), text)


def _own_templates(document: dict[str, object], path: Path) -> tuple[str, ...]:
    """Templates of each class in a file's document, then those for all other classes."""
    lists, default = document.get("classes"), document.get("default")
    if document.get("format") != TEMPLATES_FORMAT or not isinstance(lists, dict):
        raise ConfigError(f"{path} is neither a list of templates nor from pixelclip templates")
    for name, own in [("default", default), *lists.items()]:
        if not isinstance(own, list) or not own or not all(isinstance(text, str) for text in own):
            raise ConfigError(f"{path} must hold a list of templates for {name!r}")
        if any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in "".join([name, *own])):
            raise ConfigError(f"the templates for {name!r} in {path} are not plain text")
    named = [f"{name}{OWN}{template}" for name, own in lists.items() for template in own]
    return check_templates([*named, *cast(list[str], default)], str(path))


def check_templates(templates: Sequence[str], origin: str) -> tuple[str, ...]:
    """The templates, each with exactly one `{}`.

    Raises:
        ConfigError: one has not, or there are none.
    """
    if not templates:
        raise ConfigError(f"{origin} holds no template; write one per line, with {{}} for the name")
    for template in templates:
        if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise ConfigError(f"template {template!r} in {origin} needs exactly one {{}}")
    return tuple(templates)


def parse_classes(text: str) -> tuple[str, ...]:
    """Class names from a built-in list, a file with one per line, or a list in the text.

    In a text, commas separate classes; where it holds a semicolon, semicolons do, and commas
    separate synonyms: "cat; sofa, couch; window". In a file, or in a text of several lines, a
    line is a class, commas in it separate synonyms. A .json file holds a list of names.

    Raises:
        ConfigError: there are none, one is empty, or one occurs twice.
    """
    if text in class_lists():
        return class_lists()[text]
    path = Path(text)
    if _is_file(path) or (path.suffix in CLASS_SUFFIXES and not set(text) & set(",;\n")):
        lines = _lines(path, "class list", tuple(class_lists()))
        return check_classes([line.strip() for line in lines if line.strip()])
    if "\n" in text.strip():
        return check_classes([line.strip() for line in text.splitlines() if line.strip()])
    return check_classes([name.strip() for name in text.split(";" if ";" in text else ",")])


def _is_file(path: Path) -> bool:
    """Whether a user's text happens to be a file; a long list of names is no path."""
    try:
        return path.is_file()
    except OSError:
        return False


def _text(path: Path, what: str, known: tuple[str, ...]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the {what} {path}: {reason}; built in: {', '.join(known)}"
        ) from error


def _json(path: Path, what: str, known: tuple[str, ...]) -> object:
    try:
        return json.loads(_text(path, what, known))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the {what} {path} is not JSON: {error}") from error


def _lines(path: Path, what: str, known: tuple[str, ...]) -> list[str]:
    if path.suffix != ".json":
        return _text(path, what, known).splitlines()
    lines = _json(path, what, known)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ConfigError(f"the {what} {path} must hold a JSON list of names")
    return lines


def check_classes(names: Sequence[str]) -> tuple[str, ...]:
    """The class names as a tuple.

    Raises:
        ConfigError: there are none, one (or a synonym) is empty, or a name occurs twice.
    """
    if not any(name.strip() for name in names):
        raise ConfigError('no class names; give some, as in --classes "cat, sofa, window"')
    for index, name in enumerate(names):
        if not all(part.strip() for part in name.split(",")):
            raise ConfigError(f"class {index + 1} of {len(names)} is empty or has an empty synonym")
        if any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in name):
            raise ConfigError(f"class {index + 1} of {len(names)} is not plain text: {name!a}")
    seen: dict[str, str] = {}
    for name in names:
        if (key := name.strip().casefold()) in seen:
            raise ConfigError(f"class name {name.strip()!r} occurs twice")
        seen[key] = name
    return tuple(names)


def fill(template: str, name: str, *, fix_article: bool = False) -> str:
    """The template with the name in it.

    Args:
        template: text with one `{}`.
        name: of a class.
        fix_article: write "an" before a vowel; the authors do not (behaviour.md 6b).
    """
    if fix_article and name[:1].lower() in "aeiou":
        for article in ("a", "A"):
            if template.startswith(f"{article} {{}}"):
                template = f"{article}n {template[2:]}"
            template = template.replace(f" {article} {{}}", f" {article}n {{}}")
    return template.replace("{}", name)


@torch.no_grad()
def encode_texts(text: Text, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """Unit-norm features of many texts, a few hundred per call, shortest first.

    Sorting by length lets each call stop at its own longest text.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = []
    for start in range(0, len(order), TEXTS_PER_CALL):
        batch = [texts[index] for index in order[start : start + TEXTS_PER_CALL]]
        parts.append(F.normalize(text(text.tokenize(batch)).float(), dim=1))
    features = torch.cat(parts)
    return features[torch.tensor(order, device=features.device).argsort()]


def encode_classes(
    text: Text,
    names: Sequence[str],
    templates: Sequence[str] = IMAGENET_SELECT,
    *,
    fix_article: bool = False,
) -> Float[Tensor, "K D"]:
    """One unit-norm text feature per class (behaviour.md 6a).

    Each text is normalised; synonyms ("sofa, couch") are averaged and normalised per template;
    templates are averaged and normalised.

    Args:
        text: text tower.
        names: of the classes; ", " separates synonyms.
        templates: each with one `{}`.
        fix_article: see `fill`.
    """
    return torch.cat([
        F.normalize(per_template(text, names[start : start + TEXTS_PER_CALL], templates,
                                 fix_article=fix_article).mean(dim=1), dim=1)
        for start in range(0, len(names), TEXTS_PER_CALL)
    ])  # fmt: skip


def per_template(
    text: Text, names: Sequence[str], templates: Sequence[str], *, fix_article: bool = False
) -> Float[Tensor, "K T D"]:
    """Unit-norm feature per class and template, synonyms averaged."""
    synonyms = [
        (index, part.lstrip()) for index, name in enumerate(names) for part in name.split(",")
    ]
    texts = [fill(t, part, fix_article=fix_article) for _, part in synonyms for t in templates]
    features = encode_texts(text, texts).unflatten(0, (len(synonyms), len(templates)))
    owners = torch.tensor([index for index, _ in synonyms], device=features.device)
    sums = features.new_zeros(len(names), *features.shape[1:]).index_add(0, owners, features)
    counts = torch.bincount(owners, minlength=len(names))[:, None, None]
    return F.normalize(sums / counts, dim=2)


def class_features(
    backbone: Backbone,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    fix_article: bool = False,
    half: bool = False,
    cache: bool = True,
) -> Float[Tensor, "K D"]:
    """`encode_classes`, kept on disk under a hash of the text tower, names and templates.

    A cache that cannot be read or written is passed over. With `half`, a CLIP's text tower computes
    in float16.
    """

    def encode() -> Tensor:
        return encode_classes(_text_of(backbone, half), names, templates, fix_article=fix_article)

    if not cache:
        return encode()
    key = ["mean", list(names), list(templates), fix_article, half]
    return _cached(backbone, key, (len(names), backbone.dim), encode)


def template_features(
    backbone: Backbone,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    fix_article: bool = False,
    half: bool = False,
    cache: bool = True,
) -> Float[Tensor, "K T D"]:
    """The same, not averaged over the templates."""

    def encode() -> Tensor:
        text, step = _text_of(backbone, half), max(1, TEXTS_PER_CALL // len(templates))
        parts = [names[start : start + step] for start in range(0, len(names), step)]
        return torch.cat(
            [per_template(text, part, templates, fix_article=fix_article) for part in parts]
        )

    if not cache:
        return encode()
    key = ["each", list(names), list(templates), fix_article, half]
    return _cached(backbone, key, (len(names), len(templates), backbone.dim), encode)


def _cached(
    backbone: Backbone, key: list[object], shape: tuple[int, ...], encode: Callable[[], Tensor]
) -> Float[Tensor, "K *T D"]:
    """What lies on disk under that key of the model, or is made and laid there."""
    # The same weights with another activation, or cut into other heads, are another tower.
    card = backbone.card.model_dump(mode="json", include={"family", "config", "activation"})
    tower = [__version__, backbone.text_hash, card]
    digest = hashlib.sha256(json.dumps([*tower, *key]).encode()).hexdigest()[:32]
    path = cache_dir() / "text" / f"{digest}.safetensors"
    if path.is_file():
        try:
            stored = read_state(path)["features"]
            if stored.shape == shape:
                return stored.to(backbone.device)
        except (ModelError, KeyError):
            pass  # a damaged cache file is made again
    features = encode()
    with contextlib.suppress(OSError):
        write_safetensors(path, {"features": features}, {"format": "pt"})
    return features


def _text_of(backbone: Backbone, half: bool) -> Text:
    text = cast(Text, backbone.text)
    if not half:
        return text
    from pixelclip.backbones.text import ClipText, half_precision

    if not isinstance(text, ClipText):
        raise ConfigError(f"{backbone.card.name} has no CLIP text tower to compute in float16")
    return half_precision(text)


def check_distinct(features: Float[Tensor, "K D"], names: Sequence[str]) -> None:
    """Make sure that the model tells all names apart.

    Raises:
        ConfigError: two names have the same features, as those in a script the model cannot read.
    """
    rounded = (features * 1e5).round().cpu()
    _, owners, counts = rounded.unique(dim=0, return_inverse=True, return_counts=True)
    if bool((counts > 1).any()):
        twin = int(owners[(counts > 1)[owners].nonzero()[0, 0]])
        first, second = [names[int(k)] for k in (owners == twin).nonzero()[:2, 0]]
        raise ConfigError(
            f"class names {first!r} and {second!r} are the same to this model; give one of them"
            " (or words in a language and script that it reads)"
        )
