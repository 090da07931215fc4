"""Damaged masks of every kind, a small share of what `tools/fuzz_masks.py` tries."""

import importlib.util
import warnings
from collections import Counter
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "fuzz_masks.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_masks", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "count", "outcomes"),
    [
        ("rle", 500, {"mask": 40, "refused": 200}),
        ("json", 400, {"masks": 50, "DataError": 50, "a manifest": 3, "no masks": 3}),
        ("shard", 60, {"masks": 4, "DataError": 8, "no masks": 4}),
    ],
)
def test_damage_gives_masks_or_an_error_of_ours(tmp_path, fuzz, kind, count, outcomes):
    folder = fuzz.prepare(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__")  # pycocotools'
        found = Counter(fuzz.outcome_of(kind, 1, number, folder) for number in range(count))
    for outcome, at_least in outcomes.items():
        assert found[outcome] >= at_least, found
