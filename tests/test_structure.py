"""The map in docs/architecture.md holds: imports go downwards, modules stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/pixelclip"

LEVELS = {
    "errors": -3, "files": -2, "heads": -2, "photos": -1,
    "workers": 0, "config": 0, "device": 0, "progress": 0, "images": 0, "samples": 0,
    "checkpoint": 1, "upsample": 1, "overlay": 1, "rings": 1, "segmentation": 2,
    "jobs": 2, "backbones": 2, "plan": 2,
    "vocabulary": 3, "hub": 3, "masks": 3,
    "labelling": 4,
    "segmenter": 5, "training": 5,
    "output": 6, "evaluation": 6,
    "job": 7, "maskjob": 7, "evaljob": 7, "biasjob": 7, "ablation": 7,
    "maskeval": 8,
    "commands": 9,
    "cli": 10, "__main__": 11, "__init__": 11,
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    """The package or module a file belongs to."""
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pixelclip"):
            names = (node.module or "").split(".")
            yield names[1] if len(names) > 1 else None
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    own = part(path)
    for other in imports(path):
        if other is not None and other != own and own != "__init__":
            assert LEVELS[other] < LEVELS[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_and_modules_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    if part(path) == "commands":
        return  # a command's signature is its interface
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
