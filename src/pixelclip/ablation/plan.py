"""Plans of ablations and their cells; the shipped plans lie in `recipes/ablations`."""

import hashlib
import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pixelclip.config import TrainConfig, parse_value, validated
from pixelclip.errors import ConfigError
from pixelclip.masks.sources import MASK_SOURCES
from pixelclip.photos import find_photos
from pixelclip.training.live import SOURCES as LIVE_SOURCES
from pixelclip.training.loop import TrainJob
from pixelclip.training.prompts import chosen_words
from pixelclip.training.start import job_config, make_job
from pixelclip.vocabulary import parse_templates

ALIASES = {"k": "num_clusters", "gamma": "momentum", "eps": "temperature"}
# May differ among cells beside the fields of `TrainConfig`.
OWN_NAMES = ("images", "masks", "templates")
LIVE = "live-"
BASELINE = "not adapted"
BASELINE_RUN = "not-adapted"
LONGEST_NAME = 100
MAX_CELLS = 1000

Values = dict[str, object]


class Plan(BaseModel):
    """What is trained and evaluated, and what differs among the cells.

    Paths are relative to the working directory, as in all commands.

    Attributes:
        title: of table and plot.
        images: photos and folders of photos to train on.
        masks: `superpixels`, `mini`, `dino` or `sam`: made once, for all cells with these photos;
            `live-dino` or `live-mini`: made of each view while it is trained on; or a path.
        mask_settings: of the sources that make masks, by the source's name.
        model: name, weight file or run directory to start from.
        checkpoint: weights that replace the model's.
        recipe: training settings over those of the model's family: a recipe's name or a file.
        settings: fields of `TrainConfig`, over those.
        data: data sets to evaluate on: folders with images/, labels/ and classes.txt, or
            NAME=FOLDER for official downloads (`voc20=VOCdevkit`).
        photos: at most so many of each data set, evenly spaced; None: all.
        protocol: of the evaluation: default, authors or sliding.
        evaluation: fields of `SegmentConfig`, over the protocol's.
        baseline: evaluate the model before training as well.
        rows: named rows, each with the values it differs by; without any there is one.
        vary: values by name; every row is combined with all combinations of them. Names are fields
            of `TrainConfig` (k, gamma and eps for short), `images`, `masks`, and `templates`, those
            of the evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    images: tuple[str, ...] = ()
    masks: str = "superpixels"
    mask_settings: dict[str, dict[str, object]] = {}
    model: str = "mini"
    checkpoint: str | None = None
    recipe: str | None = None
    settings: dict[str, object] = {}
    data: tuple[str, ...] = ()
    photos: int | None = Field(None, ge=1)
    protocol: str = "default"
    evaluation: dict[str, object] = {}
    baseline: bool = True
    rows: dict[str, dict[str, object]] = {}
    vary: dict[str, tuple[object, ...]] = {}

    @field_validator("images", "data", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Cell:
    """A row of the table: a training run, unless it is the baseline, and how it is evaluated.

    Attributes:
        label: of the row.
        row: its name in the plan's rows; empty without.
        values: what is varied, by name.
        run: name of the run, which cells share that differ in the evaluation only.
        job: to be trained; None: nothing is.
        config: its settings.
        source: of `MASK_SOURCES`, which makes the job's masks; empty: they are there.
        templates: of the evaluation; empty: the plan's.
    """

    label: str
    row: str
    values: Values
    run: str
    job: TrainJob | None
    config: TrainConfig | None
    source: str
    templates: str


def plan_names() -> list[str]:
    """The plans in the package."""
    folder = files("pixelclip").joinpath("recipes/ablations")
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def read_plan(name: str, changes: Mapping[str, object] | None = None) -> Plan:
    """A plan of the package or from a TOML file, which may `extends` another one.

    Args:
        name: of the plan, or of the file.
        changes: by field, over the plan's; `settings` and `vary` are changed name by name.

    Raises:
        ConfigError: there is no such plan, it is no TOML, or a value is not allowed.
    """
    values = _read(name)
    base = values.pop("extends", None)
    if base is not None:
        values = _over(_read(str(base)), values)
    return validated(Plan, _over(values, changes or {}), f"plan {name}: ")


def _read(name: str) -> Values:
    if name in plan_names():
        place = files("pixelclip").joinpath(f"recipes/ablations/{name}.toml")
        return tomllib.loads(place.read_text("utf-8"))
    try:
        return tomllib.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        available = ", ".join(plan_names())
        raise ConfigError(f"cannot read plan {name}: {error}; available: {available}") from error


def _over(values: Mapping[str, object], changes: Mapping[str, object]) -> Values:
    merged = {**values, **changes}
    for key in ("settings", "evaluation"):
        merged[key] = {**_mapping(values, key), **_mapping(changes, key)}
    merged["vary"] = named(_mapping(values, "vary")) | named(_mapping(changes, "vary"))
    return merged


def _mapping(values: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = values.get(key, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key} of a plan is a table, as in [{key}], not {found!r}")
    return found


def parse_vary(texts: Sequence[str]) -> dict[str, tuple[object, ...]]:
    """Values by name from texts like `k=64,128,256`.

    Raises:
        ConfigError: a text has no `=`, no value, or a name of an earlier one.
    """
    vary: dict[str, tuple[object, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        parts = [part.strip() for part in values.split(",")]
        name = ALIASES.get(name.strip(), name.strip())
        if not equals or not name or not all(parts):
            raise ConfigError(f"--vary {text}: write name=value,value, as in --vary k=64,128,256")
        if name in vary:
            raise ConfigError(f"--vary {name} is given twice; write --vary {name}=value,value")
        vary[name] = tuple(parts if name in OWN_NAMES else map(parse_value, parts))
    return vary


def named(values: Mapping[str, object]) -> Values:
    """Values by the full names of what they are values of.

    Raises:
        ConfigError: there is nothing of that name, or one stands there twice.
    """
    known = (*TrainConfig.model_fields, *OWN_NAMES)
    full: Values = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_listed(known))}"
            raise ConfigError(f"cannot vary {key}: no such setting; {hint}")
        if name in full:
            raise ConfigError(f"{name} is given twice, as {key} too")
        full[name] = value
    return full


def _listed(known: Sequence[str]) -> list[str]:
    """All names, those with a short one first."""
    short = [f"{short} ({name})" for short, name in ALIASES.items()]
    return [*short, *(name for name in known if name not in ALIASES.values())]


def make_cells(plan: Plan, out: Path, device: str = "auto") -> list[Cell]:
    """The cells of a plan, checked as far as that can be done without training.

    Args:
        plan: what is varied.
        out: folder of the runs.
        device: to train on.

    Raises:
        ConfigError: a name or a value is wrong, or two cells are the same.
        DataError: there are no photos.
        ModelError: there is no such model.
    """
    vary = named(plan.vary)
    count = math.prod(len(_several(*item)) for item in vary.items()) * max(1, len(plan.rows))
    if count > MAX_CELLS:
        raise ConfigError(f"{count} runs; the limit is {MAX_CELLS}: vary less at a time")
    cells = [
        _cell(
            plan, out, device, row, {**named(values), **dict(zip(vary, combination, strict=True))}
        )
        for row, values in (plan.rows or {"": {}}).items()
        for combination in itertools.product(*map(_several, vary, vary.values()))
    ]
    if not plan.rows and not plan.vary:
        raise ConfigError("nothing is varied; give --vary k=64,128,256, or rows in the plan")
    for images in dict.fromkeys(cell.job.images for cell in cells if cell.job):
        find_photos(images)
    for one, other in itertools.pairwise(sorted(cells, key=_same)):
        if _same(one) == _same(other):
            raise ConfigError(f"{one.label} and {other.label} are the same; leave one out")
    baselines = [_baseline(t, cells) for t in dict.fromkeys(cell.templates for cell in cells)]
    return [*(baselines if plan.baseline else []), *cells]


def _same(cell: Cell) -> tuple[str, str]:
    return cell.run, cell.templates


def _several(name: str, values: object) -> Sequence[object]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"vary {name}: give a list of values (got {values!r})")
    return values


def _baseline(templates: str, cells: Sequence[Cell]) -> Cell:
    several = len({cell.templates for cell in cells}) > 1
    label = f"{BASELINE}, templates={templates}" if several else BASELINE
    values: Values = {"templates": templates} if several else {}
    return Cell(label, BASELINE, values, BASELINE_RUN, None, None, "", templates)


def _cell(plan: Plan, out: Path, device: str, row: str, values: Values) -> Cell:
    """A row of the plan with one combination of values."""
    varied = [f"{name}={_text(values[name])}" for name in named(plan.vary)]
    label = ", ".join([*([row] if row else []), *varied])
    trained = {key: value for key, value in values.items() if key != "templates"}
    run = file_name(",".join(f"{key}={_text(value)}" for key, value in trained.items()) or "base")
    templates = str(values.get("templates", ""))
    try:
        job, source = _job(plan, out, device, run, trained)
        settings = {key: value for key, value in trained.items() if key not in OWN_NAMES}
        config = job_config(job, plan.recipe, {**plan.settings, **settings})
        parse_templates(config.train_templates)
        if templates:
            parse_templates(templates, of_classes=True)
        if "words" in (config.class_vectors, config.prompt_start):
            chosen_words(config)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    return Cell(label, row, values, run, job, config, source, templates)


def _job(plan: Plan, out: Path, device: str, run: str, values: Values) -> tuple[TrainJob, str]:
    """What is trained, and the source that makes its masks, if one does.

    Raises:
        ConfigError: photos or masks are not given, or the photos would hold the results.
    """
    images = _paths(values.get("images", plan.images))
    if not images:
        raise ConfigError("no photos to train on; give --images FOLDER")
    for path in images:
        if out.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"-o {out} lies in the photos of {path}; give a folder outside")
    masks = str(values.get("masks", plan.masks))
    live = masks.removeprefix(LIVE)
    job = make_job(
        images,
        out / "runs" / run,
        masks=None,
        model=plan.model,
        checkpoint=plan.checkpoint,
        device=device,
    )
    if Path(masks).exists():
        return replace(job, masks=Path(masks)), ""
    if masks.startswith(LIVE) and live in LIVE_SOURCES:
        return replace(job, live=live), ""
    if masks in MASK_SOURCES:
        digest = hashlib.sha256("\n".join(map(str, images)).encode()).hexdigest()[:8]
        return replace(job, masks=out / "masks" / f"{masks}-{digest}"), masks
    names = ", ".join([*MASK_SOURCES, *(LIVE + name for name in LIVE_SOURCES)])
    raise ConfigError(f"no masks at {masks}; give a path or one of {names}")


def _paths(value: object) -> list[Path]:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"images: give a path or several (got {value!r})")
    return [Path(part) for part in parts]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def file_name(text: str) -> str:
    """A name for a file, other texts having other ones."""
    plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)
    if plain == text and len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
