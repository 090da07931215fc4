"""`pixelclip masks` as a person uses it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixelclip
from pixelclip.masks.make import make_masks
from pixelclip.masks.sources import MASK_SOURCES, described, source_settings
from pixelclip.masks.store import MaskStore
from tests.test_cli import one_line, own_folder, run  # noqa: F401 - fixtures
from tests.tiny import photo

SIZES = [(60, 40), (50, 50), (40, 64), (60, 40), (61, 33)]


@pytest.fixture
def photos(own_folder):  # noqa: F811
    (own_folder / "photos/deep").mkdir(parents=True)
    for seed, (width, height) in enumerate(SIZES):
        photo(width, height, seed).save(f"photos/{'deep/' if seed % 2 else ''}{seed}.png")
    return own_folder / "photos"


@pytest.fixture
def truth(photos):
    """A person's regions: the left and the right half."""
    (photos.parent / "truth/labels").mkdir(parents=True)
    for path in sorted(photos.rglob("*.png")):
        with Image.open(path) as image:
            regions = np.ones((image.height, image.width), dtype=np.uint16)
        regions[:, image.width // 2 :] = 2
        Image.fromarray(regions).save(photos.parent / "truth/labels" / f"{path.stem}_0.png")
    return photos.parent / "truth"


def test_the_default_is_superpixels_with_a_store_that_training_reads(run, photos):  # noqa: F811
    code, out, err = run("masks", "photos")
    assert (code, err) == (0, "")
    assert "masks of 5 photo(s) -> pixelclip-masks/" in out
    assert len(MaskStore(Path("pixelclip-masks"))) == 5
    code, out, _ = run("masks", "photos")
    assert "5 of them were there already" in out


def test_settings_reach_the_source_and_the_manifest(run, photos):  # noqa: F811
    assert run("masks", "photos", "-o", "m", "--set", "threshold=3", "--set", "nested=true")[0] == 0
    settings = json.loads(Path("m/masks.json").read_text())["settings"]
    assert (settings["threshold"], settings["nested"]) == (3.0, True)
    code, _, err = run("masks", "photos", "-o", "m", "--source", "superpixels")
    assert code == 2
    assert "m holds masks with other threshold (3.0, now " in one_line(err)
    assert run("masks", "photos", "-o", "m")[0] == 0  # the store's own


def test_the_same_bytes_from_any_number_of_workers(run, photos):  # noqa: F811
    for workers in (1, 2):
        run("masks", "photos", "-o", f"m{workers}", "--workers", workers, "--shard-size", "2")
    one, two = ({p.name: p.read_bytes() for p in Path(f"m{n}").iterdir()} for n in (1, 2))
    assert one == two
    assert len(one) == 5


def test_a_broken_photo_is_listed_and_the_others_are_done(run, photos):  # noqa: F811
    (photos / "broken.jpg").write_bytes(b"broken")
    code, out, err = run("masks", "photos", "-o", "m", "--json", "--show")
    assert code == 1
    report = json.loads(out)
    assert (report["new"], report["photos"]) == (5, 6)
    assert report["failed"][0]["photo"] == "photos/broken.jpg"
    assert err.count("failed:") == 1
    Path("only").mkdir()
    Path("only/broken.jpg").write_bytes(b"broken")
    code, out, err = run("masks", "only", "-o", "none", "--json", "--show")
    assert code == 2
    assert json.loads(out)["failed"][0]["photo"] == "only/broken.jpg"
    assert "no photo got masks; first: only/broken.jpg is not a photo" in one_line(err)


def test_a_folder_of_masks_is_scored_shown_and_exported(run, photos, truth):  # noqa: F811
    code, out, _ = run("masks", "photos", "-o", "m", "--score", truth, "--show", "--json",
                       "--clusters", "mini", "--export", "maps", "--format", "labels")  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["score"]["regions"] == 10
    assert 0 < report["score"]["covering"] <= 1
    for picture in (report["sheet"], report["clusters"]):
        with Image.open(picture) as image:
            assert min(image.size) > 100
    assert len(list(Path("maps").rglob("*.png"))) == 5
    assert report["export"]["photos"] == 5
    _, text, _ = run("masks", "photos", "-o", "m", "--score", truth)
    assert "covering" in text


def test_perfect_masks_of_others_score_perfectly(run, photos, truth):  # noqa: F811
    for path in (truth / "labels").iterdir():
        path.rename(path.with_name(path.name.replace("_0", "")))
    code, out, _ = run("masks", "photos", "--masks", "truth/labels", "--score", "truth", "--json")
    assert code == 0
    score = json.loads(out)["score"]
    assert (score["recall_70"], score["covering"], score["masks_per_photo"]) == (1, 1, 2)
    assert not Path("pixelclip-masks").exists()


def test_masks_of_others_become_a_store_and_sa1b_json(run, photos, truth):  # noqa: F811
    for path in (truth / "labels").iterdir():
        path.rename(path.with_name(path.name.replace("_0", "")))
    assert run("masks", "photos", "--masks", "truth/labels", "-o", "m")[0] == 0
    assert run("masks", "photos", "-o", "m", "--export", "again")[0] == 0
    assert "say --masks again" in one_line(run("masks", "photos", "-o", "m")[2])
    assert run("masks", "photos", "--masks", "m", "--export", "sa1b")[0] == 0
    document = json.loads(Path("sa1b/deep/1.json").read_text())
    assert [a["area"] for a in document["annotations"]] == [25 * 50, 25 * 50]
    assert run("masks", "photos", "--masks", "m", "--export", "c.json", "--format", "coco")[0] == 0
    assert len(json.loads(Path("c.json").read_text())["annotations"]) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no such photo or folder: nowhere"),
        (("photos", "--source", "magic"), "unknown source 'magic'; available: superpixels, dino"),
        (("photos", "--set", "treshold=1"), "treshold: no such setting; did you mean threshold?"),
        (("photos", "--set", "threshold=many"), "source superpixels: threshold"),
        (("photos", "--engine", "dask"), "unknown engine 'dask'; available: local, ray"),
        (("photos", "--workers", "0"), "0 workers; at least 1"),
        (("photos", "--shard-size", "0"), "shard"),
        (("photos", "--masks", "nowhere"), "nothing to do with --masks"),
        (("photos", "--masks", "nowhere", "--show"), "no masks at nowhere"),
        (("photos", "--masks", "photos", "-o", "m", "--source", "mini"), "--source and its"),
        (("photos", "--score", "nowhere"), "nowhere"),
        (("photos", "--export", "x", "--format", "yolo"), "available: sa1b, coco, labels"),
        (("photos", "--export", "photos", "--format", "coco"), "is a folder"),
        (("photos", "--source", "dino", "--checkpoint", "nowhere"), "nowhere"),
        (("photos", "--source", "mini", "--device", "cuda"), "no cuda device"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(run, photos, arguments, message):  # noqa: F811
    code, _, err = run("masks", *arguments)
    assert code == 2
    assert message in one_line(err)
    assert not list(photos.parent.rglob("*.parquet"))


def test_every_source_documents_its_settings():
    page = (Path(__file__).parents[1] / "docs/masks.md").read_text()
    for name, kind in MASK_SOURCES.items():
        settings = kind().settings
        for field in settings.model_fields:
            texts = [parent.__doc__ or "" for parent in settings.__mro__]
            assert any(f"{field}:" in text for text in texts), f"{name}: {field}"
            assert f"`{field}`" in page, f"{name}: {field}"


def test_a_checkpoint_is_told_by_its_content(tmp_path):
    (tmp_path / "one").write_bytes(b"weights")
    (tmp_path / "two").write_bytes(b"weights")
    settings = [source_settings("sam", {"checkpoint": str(tmp_path / n)}) for n in ("one", "two")]
    one, two = map(described, settings)
    assert one == two
    (tmp_path / "two").write_bytes(b"others")
    assert described(settings[1]) != one


def test_masks_are_made_from_python(photos):
    made = pixelclip.make_masks("photos", "m", settings={"threshold": 1.0})
    assert (made.new, made.failed) == (5, [])
    assert make_masks(["photos/0.png", Path("photos/2.png")], "n").new == 2
