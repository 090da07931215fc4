"""The loader: the same batches however they are made, and no photo that stops a run."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pixelclip.errors import ConfigError, DataError
from pixelclip.images import load_photo, read_photo, read_size
from pixelclip.masks.runs import PhotoMasks, from_masks
from pixelclip.photos import Photo
from pixelclip.training.data import TrainPhotos, collate, make_loader
from pixelclip.training.views import ViewSettings, crop_photo, draw_geometry

SMALL = ViewSettings(short_side=40, long_side=60, crop_size=32, mask_size=16, seed=3)


@dataclass(frozen=True)
class Halves:
    """A reader: the left and the right half of each photo, one broken annotation; by name others.

    Of a photo named `bare` there is no annotation, that of one named `foreign` is unusable.
    """

    def __call__(self, photo: Photo, size: tuple[int, int]) -> PhotoMasks | None:
        if photo.path.stem == "bare":
            return None
        if photo.path.stem == "foreign":
            raise DataError(f"{photo.path}: masks of another photo")
        columns = np.arange(size[1])
        left = np.broadcast_to(columns < size[1] / 2, size)
        return replace(from_masks(np.stack([left, ~left])), broken=1)


def save(path, image, **options):
    image.save(path, **options)
    return Photo(path, Path(path.stem))


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path):
    sizes = [(50, 40), (40, 50), (90, 40), (33, 60), (64, 64), (20, 300), (70, 50)]
    return [save(tmp_path / f"{i}.png", noise(*size, seed=i)) for i, size in enumerate(sizes)]


WIDE = np.array([True, False, True, False, False, False, True])


def same_sample(one, other):
    assert torch.equal(one.weak, other.weak)
    assert torch.equal(one.strong, other.strong)
    assert torch.equal(one.masks, other.masks)


def same_batch(one, other):
    assert torch.equal(one.batch.weak, other.batch.weak)
    assert torch.equal(one.batch.strong, other.batch.strong)
    assert torch.equal(one.batch.sizes, other.batch.sizes)
    assert all(map(torch.equal, one.batch.masks, other.batch.masks))
    assert one.problems == other.problems
    assert one.broken_masks == other.broken_masks


def test_a_sample_is_a_function_of_seed_position_and_photo(photos):
    data = TrainPhotos(photos, Halves(), SMALL)
    same_sample(data[5, 2], TrainPhotos(photos, Halves(), SMALL)[5, 2])
    assert not torch.equal(data[5, 2].weak, data[6, 2].weak)
    other = TrainPhotos(photos, Halves(), replace(SMALL, seed=4))
    assert not torch.equal(data[5, 2].weak, other[5, 2].weak)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_make_the_batches_that_one_process_makes(photos, num_workers):
    data = TrainPhotos([*photos, Photo(Path("missing.png"), Path("missing"))], Halves(), SMALL)
    wide = np.array([*WIDE, True])
    alone = make_loader(data, wide, batch_size=3)
    helped = make_loader(data, wide, batch_size=3, num_workers=num_workers)
    for one, other in islice(zip(alone, helped, strict=False), 6):
        same_batch(one, other)
    helped.close()


def test_no_two_places_of_the_sequence_have_the_same_view(photos):
    data = TrainPhotos(photos[4:5], Halves(), SMALL)
    batches = islice(make_loader(data, np.ones(1, dtype=bool), batch_size=3), 4)
    views = torch.cat([loaded.batch.weak for loaded in batches])
    assert len(views.flatten(1).unique(dim=0)) == 12


def test_a_loader_begun_later_goes_on_as_if_never_stopped(photos):
    data = TrainPhotos(photos, Halves(), SMALL)
    whole = list(islice(make_loader(data, WIDE, batch_size=3), 7))
    later = list(islice(make_loader(data, WIDE, batch_size=3, start=4), 3))
    for one, other in zip(whole[4:], later, strict=True):
        same_batch(one, other)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_processes_together_make_the_batch_of_one(photos, num_ranks):
    data = TrainPhotos(photos, Halves(), SMALL)
    whole = next(make_loader(data, WIDE, batch_size=5, start=2)).batch
    shares = [
        next(make_loader(data, WIDE, batch_size=5, start=2, rank=rank, num_ranks=num_ranks)).batch
        for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat([share.weak for share in shares]), whole.weak)
    assert torch.equal(torch.cat([share.strong for share in shares]), whole.strong)
    masks = [grid for share in shares for grid in share.masks]
    assert all(map(torch.equal, masks, whole.masks))


def test_the_loader_leaves_torchs_random_numbers_alone(photos):
    before = torch.get_rng_state()
    next(make_loader(TrainPhotos(photos, Halves(), SMALL), WIDE, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_colour_and_strong_view_pixels_are_those_of_the_photo(tmp_path):
    photo = save(tmp_path / "even.png", Image.new("RGB", (60, 50), (10, 200, 90)))
    options = replace(SMALL, colour=False, strong_view=False)
    sample = TrainPhotos([photo], Halves(), options)[0, 0]
    assert sample.strong is None
    assert (sample.weak == torch.tensor([10, 200, 90])[:, None, None]).all()
    assert collate([sample]).batch.strong is None


def test_the_strong_view_is_black_where_masks_were_cut_out(photos):
    options = replace(SMALL, mask_size=32, colour=False)  # every pixel of the frame
    sample = TrainPhotos(photos, Halves(), options)[1, 4]
    left_out = ~sample.masks.any(dim=0)  # both halves together cover the photo
    assert left_out.any()
    assert (sample.strong[:, left_out] == 0).all()
    assert (sample.weak[:, left_out] > 0).any()


def test_a_photo_that_cannot_be_used_is_replaced_and_reported(photos, tmp_path):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8\xff nothing")
    foreign = save(tmp_path / "foreign.png", noise(50, 40))
    data = TrainPhotos([Photo(damaged, Path("damaged")), foreign, *photos], Halves(), SMALL)
    loaded = collate([data[0, 0], data[1, 1], data[2, 2]])
    reported = {problem.path.name for problem in loaded.problems}
    assert reported == {"damaged.jpg", "foreign.png"}
    assert any("masks of another photo" in problem.message for problem in loaded.problems)
    assert len(loaded.batch) == 3
    assert loaded.broken_masks == 3  # one in each of the photos used


@pytest.mark.parametrize("num_workers", [0, 1])
def test_photos_none_of_which_can_be_used_are_one_line(num_workers, tmp_path):
    data = TrainPhotos([Photo(tmp_path / "a.jpg", Path("a"))], Halves(), SMALL)
    loader = make_loader(data, np.ones(1, dtype=bool), batch_size=2, num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        next(loader)
    assert str(caught.value) == (
        "1 photos in a row cannot be used for training; the first:"
        f" no such photo: {tmp_path / 'a.jpg'}"
    )


def test_a_photo_without_annotation_has_no_masks(tmp_path):
    photo = save(tmp_path / "bare.png", noise(50, 40))
    sample = TrainPhotos([photo], Halves(), SMALL)[0, 0]
    assert sample.masks.shape == (0, 16, 16)
    assert sample.problems == ()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (1, 5000), (31, 33)])
def test_photos_of_any_size_become_views(size, tmp_path):
    photo = save(tmp_path / "photo.png", noise(*size))
    sample = TrainPhotos([photo], Halves(), ViewSettings(crop_size=64, mask_size=32))[0, 0]
    height, width = sample.size
    assert 1 <= height <= 64
    assert 1 <= width <= 64
    assert not sample.weak[:, height:].any()
    assert not sample.weak[:, :, width:].any()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_photos_of_any_mode_become_views(mode, tmp_path):
    suffix = "jpg" if mode == "CMYK" else "png"
    grey = noise(50, 40).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = noise(50, 40).convert(mode)
    photo = save(tmp_path / f"photo.{suffix}", image)
    sample = TrainPhotos([photo], Halves(), SMALL)[0, 0]
    assert sample.problems == ()
    assert len(sample.weak.unique()) > (1 if mode == "1" else 5)


def test_masks_lie_on_an_exif_turned_photo_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: what is stored at the bottom is seen at the left
    stored = Image.new("RGB", (60, 40), "black")
    stored.paste("white", (0, 20, 60, 40))
    photo = save(tmp_path / "turned.jpg", stored, exif=exif, quality=100)
    options = replace(SMALL, mask_size=32, colour=False, strong_view=False)
    data = TrainPhotos([photo], Halves(), options)
    for position in range(8):  # flipped and not
        sample = data[position, 0]
        bright = (sample.weak[0] > 128)[None]
        left, right = sample.masks[0], sample.masks[-1]
        assert (bright[0] == left).float().mean() > 0.96  # but for the blur of the border
        assert len(sample.masks) == 1 or not (left & right).any()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_head_of_a_file_gives_the_size_of_the_upright_photo(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = save(tmp_path / f"photo.{suffix}", noise(60, 40), exif=exif)
    assert read_size(photo.path) == read_photo(photo.path).size
    assert TrainPhotos([photo], Halves(), SMALL)[0, 0].problems == ()


def test_a_photo_of_another_size_than_its_head_says_is_a_problem():
    geometry = draw_geometry(np.random.default_rng(0), (60, 40), SMALL)
    with pytest.raises(DataError, match="has 50 x 40 pixels where its head says 60 x 40"):
        crop_photo(noise(50, 40), geometry)


def test_a_jpeg_is_decoded_small_but_never_smaller_than_needed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = save(tmp_path / "upright.jpg", noise(400, 300)).path
    turned = save(tmp_path / "turned.jpg", noise(300, 400), exif=exif).path
    assert load_photo(upright, at_least=(100, 75)).size == (100, 75)
    assert load_photo(upright, at_least=(101, 75)).size == (200, 150)
    assert load_photo(upright, at_least=(201, 10)).size == (400, 300)
    assert load_photo(turned, at_least=(200, 150)).size == (150, 200)
    assert load_photo(turned, at_least=(200, 151)).size == (300, 400)


def test_a_large_photo_looks_the_same_when_decoded_small(tmp_path):
    smooth = noise(12, 9).resize((1203, 901), Image.Resampling.BICUBIC)
    options = replace(SMALL, colour=False, strong_view=False)
    exact = TrainPhotos([save(tmp_path / "a.png", smooth)], Halves(), options)
    small = TrainPhotos([save(tmp_path / "a.jpg", smooth, quality=98)], Halves(), options)
    for position in range(4):
        difference = exact[position, 0].weak.int() - small[position, 0].weak.int()
        assert difference.abs().float().mean() < 0.8


def test_a_photo_above_the_limit_is_not_decoded(photos, tmp_path):
    large = save(tmp_path / "large.png", noise(300, 300))
    data = TrainPhotos([large, photos[0]], Halves(), replace(SMALL, max_pixels=10_000))
    assert "too large" in data[0, 0].problems[0].message


def test_a_batch_must_have_a_photo_for_each_process(photos):
    data = TrainPhotos(photos, Halves(), SMALL)
    with pytest.raises(ConfigError, match="a batch of 2 photos cannot feed 3 processes"):
        make_loader(data, WIDE, batch_size=2, num_ranks=3)
    with pytest.raises(ConfigError, match="there are no photos to train on"):
        make_loader(TrainPhotos([], Halves(), SMALL), np.ones(0, dtype=bool), batch_size=2)


def test_a_worker_that_dies_is_one_line(photos):
    data = TrainPhotos(photos, Halves(), SMALL)
    loader = make_loader(data, WIDE, batch_size=2, num_workers=1)
    next(loader)
    for process in psutil.Process().children(recursive=True):
        if process.name() == "pt_data_worker":
            process.kill()
    with pytest.raises(DataError, match="a process that reads photos died"):
        for _ in loader:
            pass


ENDLESS = """
import sys
from pathlib import Path
import numpy as np
from pixelclip.photos import Photo
from pixelclip.training.data import TrainPhotos, make_loader
from tests.test_training_data import SMALL, Halves
if __name__ == "__main__":
    data = TrainPhotos([Photo(Path(sys.argv[1]), Path("a"))], Halves(), SMALL)
    for _ in make_loader(data, np.ones(1, dtype=bool), batch_size=4, num_workers=2):
        print("batch", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no kill")
def test_workers_end_when_their_process_is_killed(photos, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), str(photos[0].path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "batch\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
