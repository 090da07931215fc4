"""The sequence of batches: what it is a function of, and where it can begin."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixelclip.photos import Photo
from pixelclip.training.order import global_batches, local_slice, wider

PILES = st.lists(st.booleans(), min_size=1, max_size=30).map(np.array)
SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)


def first_batches(wide, count, **options):
    return [batch.tolist() for batch in islice(global_batches(wide, **options), count)]


def grouped_slowly(wide, batch_size, seed, count):
    """The batches as detectron2's AspectRatioGroupedDataset makes them of an endless sampler."""
    piles = {True: [], False: []}
    epoch = 0
    while True:
        for photo in np.random.default_rng([seed, 0, epoch]).permutation(len(wide)).tolist():
            pile = piles[bool(wide[photo])]
            pile.append(photo)
            if len(pile) == batch_size:
                yield list(pile)
                pile.clear()
                count -= 1
                if count == 0:
                    return
        epoch += 1


@given(PILES, SIZES, SEEDS)
def test_batches_are_those_of_two_piles_that_are_filled_one_photo_at_a_time(wide, size, seed):
    slowly = list(grouped_slowly(wide, size, seed, 20))
    assert first_batches(wide, 20, batch_size=size, seed=seed) == slowly


@given(PILES, SIZES, SEEDS, st.integers(0, 200))
def test_a_sequence_begun_at_a_later_batch_is_the_same(wide, size, seed, start):
    whole = first_batches(wide, start + 5, batch_size=size, seed=seed)
    assert first_batches(wide, 5, batch_size=size, seed=seed, start=start) == whole[start:]


def test_a_late_batch_of_a_large_set_comes_at_once():
    wide = np.random.default_rng(0).random(100_000) < 0.7
    batches = global_batches(wide, batch_size=48, seed=0, start=10**9)
    assert len(next(batches)) == 48  # going through a thousand million batches would take hours


@given(PILES, SIZES, SEEDS)
def test_a_batch_holds_photos_of_one_pile(wide, size, seed):
    for batch in first_batches(wide, 10, batch_size=size, seed=seed):
        assert len(set(wide[batch].tolist())) == 1


@given(st.integers(1, 30), SIZES, SEEDS)
def test_without_piles_every_epoch_has_all_photos(count, size, seed):
    batches = first_batches(np.ones(count, dtype=bool), count, batch_size=size, seed=seed)
    for epoch in np.array(batches).reshape(size, count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_seeds_and_epochs_have_orders_of_their_own():
    wide = np.ones(50, dtype=bool)
    first = first_batches(wide, 2, batch_size=50, seed=1)
    assert first[0] != first[1]
    assert first[0] != first_batches(wide, 1, batch_size=50, seed=2)[0]


@given(st.integers(1, 100), st.integers(1, 20))
def test_processes_share_a_batch_evenly_and_wholly(count, num_ranks):
    photos = list(range(count))
    shares = [photos[local_slice(count, rank, num_ranks)] for rank in range(num_ranks)]
    assert [photo for share in shares for photo in share] == photos
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture
def photos(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.jpg")
    Image.new("RGB", (20, 30)).save(tmp_path / "high.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("L", (20, 20)).save(tmp_path / "square.png")
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    names = ("wide.jpg", "high.png", "turned.jpg", "square.png", "broken.jpg", "missing.jpg")
    return [Photo(tmp_path / name, tmp_path / name) for name in names]


def test_photos_are_told_apart_as_they_are_seen_and_unreadable_ones_are_wide(photos):
    assert wider(photos).tolist() == [True, False, False, False, True, True]
