"""Batches: the frame, the grid of the masks, parts, and the way to another process."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelclip.training.batch import make_batch

SIDES = st.integers(1, 13)


def drawn_photo(draw, generator):
    height, width = draw(SIDES), draw(SIDES)
    view = torch.randint(256, (3, height, width), generator=generator).to(torch.uint8)
    masks = torch.rand(draw(st.integers(0, 3)), height, width, generator=generator) < 0.5
    return view, masks


@st.composite
def photos(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    pairs = [drawn_photo(draw, generator) for _ in range(draw(st.integers(1, 4)))]
    return [view for view, _ in pairs], [masks for _, masks in pairs]


@given(photos(), st.integers(1, 16), st.booleans())
def test_each_grid_pixel_is_the_nearest_of_the_frame_or_of_the_stretched_mask(photos, m, pad):
    views, masks = photos
    batch = make_batch(views, None, masks, mask_size=m, pad_masks=pad)
    height, width = batch.weak.shape[2:]
    for given_masks, grid in zip(masks, batch.masks, strict=True):
        rows, columns = given_masks.shape[1:]
        for i in range(m):
            for j in range(m):
                row = i * (height if pad else rows) // m
                column = j * (width if pad else columns) // m
                is_inside = row < rows and column < columns
                expected = given_masks[:, row, column] if is_inside else torch.tensor(False)
                assert (grid[:, i, j] == expected).all()


@given(photos())
def test_views_lie_in_the_corner_of_the_smallest_common_frame(photos):
    views, masks = photos
    batch = make_batch(views, views, masks, mask_size=4)
    assert batch.weak.shape[2] == max(view.shape[1] for view in views)
    assert batch.weak.shape[3] == max(view.shape[2] for view in views)
    for frame, strong, (height, width), view in zip(
        batch.weak, batch.strong, batch.sizes.tolist(), views, strict=True
    ):
        assert torch.equal(frame[:, :height, :width], view)
        assert torch.equal(strong[:, :height, :width], view)


@given(photos(), st.integers(1, 6))
def test_parts_hold_all_photos_once_in_sequence(photos, parts):
    views, masks = photos
    batch = make_batch(views, views, masks, mask_size=4, frame=(16, 20))
    split = batch.split(parts)
    assert len(split) == min(parts, len(views))
    assert max(map(len, split)) - min(map(len, split)) <= 1
    assert torch.equal(torch.cat([part.weak for part in split]), batch.weak)
    assert torch.equal(torch.cat([part.strong for part in split]), batch.strong)
    assert torch.equal(torch.cat([part.sizes for part in split]), batch.sizes)
    joined = [grid for part in split for grid in part.masks]
    assert all(torch.equal(a, b) for a, b in zip(joined, batch.masks, strict=True))


@pytest.mark.parametrize("strong", [True, False])
def test_a_batch_arrives_whole_in_another_process(strong):
    views = [torch.full((3, 2, 3), 7, dtype=torch.uint8), torch.ones(3, 4, 1, dtype=torch.uint8)]
    masks = [torch.ones(2, 2, 3, dtype=torch.bool), torch.ones(0, 4, 1, dtype=torch.bool)]
    batch = make_batch(views, views if strong else None, masks, mask_size=4)
    arrived = pickle.loads(pickle.dumps(batch))
    assert torch.equal(arrived.weak, batch.weak)
    assert torch.equal(arrived.sizes, batch.sizes)
    assert (arrived.strong is not None) == strong
    assert [len(grid) for grid in arrived.masks] == [2, 0]
    assert torch.equal(arrived.masks[0], batch.masks[0])


def test_a_batch_goes_to_a_device():
    view = torch.ones(3, 2, 3, dtype=torch.uint8)
    batch = make_batch([view], [view], [torch.ones(1, 2, 3, dtype=torch.bool)], mask_size=4)
    moved = batch.to("meta")
    parts = [moved.weak, moved.strong, moved.sizes, *moved.masks]
    assert all(part.device.type == "meta" for part in parts)
