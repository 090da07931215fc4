"""Do damaged masks ever give anything but masks or an error of ours?

    python tools/fuzz_masks.py [--count 100000] [--seed 0] [--kinds rle json shard large]

Damages run-length codes (COUNT of them), JSON documents with the PNGs beside some (COUNT) and
Parquet shards (COUNT / 20), makes files as large as they may be (COUNT / 2000), reads each as a
user would, and compares with a decoder of twenty lines and with pycocotools. A case depends on
the seed and its number only: what a line names as failed is run again by `--first NUMBER
--count 1`. Exit code 1 if a case fails or the memory that was needed is above a limit.
"""

import argparse
import copy
import faulthandler
import io
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco

from pixelclip.errors import PixelClipError
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.details import parse_details, sa1b_document
from pixelclip.masks.export import export_coco, export_labels, export_sa1b, stored_photos
from pixelclip.masks.runs import PhotoMasks, from_masks, from_rle
from pixelclip.masks.store import (
    FAILURES,
    SCHEMA,
    MaskStore,
    Row,
    make_row,
    read_manifest,
    shard_failures,
    shard_path,
    write_manifest,
    write_shard,
)
from pixelclip.photos import Photo

MAX_LINES = 20  # on cases that failed
MAX_MEMORY = 2**30  # bytes; the packages alone take 200 MB
SIZE, LARGE = (6, 8), (4000, 4000)
ODD = [None, True, -1, 0, 1, 6, 8, 2**31, 2**63, 2**80, 0.5, -0.0, 1e308, float("nan"),
       float("inf"), "", "..", "../x", "/x", "é", "\0", "\ud800", "a.jpg", [], {}, [[]], [{}],
       {"size": [6, 8]}, {"size": [6, 8], "counts": []}, [1] * 6, [[1, 2, 3, 4, 5, 1e300]],
       [[0, 0, 8, 0, 8, 6]], "o" * 1000, "0" * 1000, [0] * 1000, [[0, 0] * 500]]  # fmt: skip


def damaged(text: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bytes that were a text."""
    content = bytearray(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(content) + 1)
        span = rng.choice([1, 1, 2, 5, 40])
        match rng.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(content):
                content[at] = rng.randrange(256)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + span]
            case 4:
                content[at:at] = rng.randbytes(span)
            case 5:  # a splice
                content[at:] = other[rng.randrange(len(other) + 1) :]
            case 6:  # a part twice
                content[at:at] = content[at : at + span]
            case _:  # numbers that never end, in a code; letters elsewhere
                content[at:at] = rng.choice([b"o", b"P", b"_", b"0", b"[", b"9"]) * span
    return bytes(content)


def mutated(document: object, rng: random.Random) -> object:
    """A document with some values in it replaced, or gone."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 4])):
        node = document
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = copy.deepcopy(rng.choice(ODD))
            break
    return document


def expect(claim: bool, what: str) -> None:
    """Fail the case unless that is so."""
    if not claim:
        raise AssertionError(what)


def check_masks(masks: PhotoMasks) -> None:
    """Make sure that masks are what `PhotoMasks` promises."""
    starts, ends, owners = masks.starts, masks.ends, masks.owners
    expect(bool((starts >= 0).all() and (starts < ends).all()), "runs are empty")
    expect(bool((ends <= masks.height * masks.width).all()), "runs leave the photo")
    expect(bool((np.diff(owners) >= 0).all()), "runs are not sorted by mask")
    expect(bool(((owners >= 0) & (owners < masks.count)).all()), "a run is of no mask")
    is_same = np.diff(owners) == 0
    expect(bool((starts[1:][is_same] > ends[:-1][is_same]).all()), "runs touch")
    expect(masks.scores.shape == (masks.count,), "not one score per mask")
    expect(bool(((masks.scores >= 0) & (masks.scores <= 1)).all()), "a score is out of range")
    expect(masks.details is None or len(masks.details) == masks.count, "not one detail per mask")
    again = from_rle(masks.height, masks.width, masks.to_rle())
    expect(again.count == masks.count and not again.broken, "codes of ours are damaged")
    expect(np.array_equal(again.starts, starts), "codes of ours are others")


# --- run-length codes


def some_masks(rng: random.Random, count: int, size: tuple[int, int]) -> PhotoMasks:
    """Masks of blobs, noise, everything and nothing."""
    generator = np.random.default_rng(rng.getrandbits(32))
    shares = generator.choice([0, 0.05, 0.5, 0.95, 1], (count, 1, 1))
    masks = generator.random((count, *size)) < shares
    blobs = generator.random(count) < 0.5
    masks[blobs] = np.maximum.accumulate(masks[blobs], axis=1)
    return from_masks(masks)


def numbers_in(text: bytes) -> list[int] | None:
    """The counts in a code, as COCO's `rleFrString` reads them; None if it is none."""
    counts: list[int] = []
    value = groups = 0
    for character in text:
        if not 48 <= character < 112:
            return None
        value |= (character - 48 & 0x1F) << 5 * groups
        groups += 1
        if groups > 7:
            return None
        if character - 48 & 0x20:
            continue
        if character - 48 & 0x10:
            value -= 1 << 5 * groups
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = groups = 0
    return None if groups else counts


def fills(counts: object, pixels: int) -> bool:
    """Whether counts are those of a mask of so many pixels."""
    if not isinstance(counts, list) or not all(type(n) is int for n in counts):
        return False
    return bool(counts) and all(0 <= n <= pixels for n in counts) and sum(counts) == pixels


def shifted(counts: list[int], rng: random.Random) -> list[int]:
    """Other counts that may fill the same photo: pixels moved from one run to another."""
    counts = [*counts, *[0] * rng.randrange(3)]
    for _ in range(rng.randrange(1, 4)):
        a, b = rng.randrange(len(counts)), rng.randrange(len(counts))
        step = rng.randrange(max(1, counts[a]) + 1)
        counts[a] -= step
        counts[b] += step
    return counts


def stretched(counts: list[int], rng: random.Random) -> bytes:
    """The code of counts, some numbers in more groups of 5 bits than they need."""
    text = bytearray()
    for at, count in enumerate(counts):
        value = count - (counts[at - 2] if at > 2 else 0)
        padding = rng.choice([0, 0, 0, 1, 4, 5, 6, 7])
        while True:
            group = value & 0x1F
            value >>= 5
            is_last = value == (-1 if group & 0x10 else 0)
            is_more = not is_last or padding > 0
            text.append(48 + group + 0x20 * is_more)
            if not is_more:
                break
            padding -= is_last
    return bytes(text)


def damaged_code(text: bytes, other: bytes, rng: random.Random) -> object:
    """The compressed or plain counts of no mask, or of another one."""
    match rng.randrange(8):
        case 0:
            return shifted(numbers_in(text) or [], rng)
        case 1:
            return mutated(numbers_in(text), rng)
        case 2:
            return rng.randbytes(rng.randrange(60))
        case 3:
            return bytes(rng.randrange(48, 112) for _ in range(rng.randrange(12)))
        case 4:
            return stretched(numbers_in(text) or [], rng)
        case _:
            return damaged(text, other, rng)


def counts_of(segmentation: object, height: int, width: int) -> object:
    """The counts in a segmentation, if its size and length are right."""
    code = segmentation
    if isinstance(segmentation, dict):
        code = segmentation.get("counts") if segmentation.get("size") == [height, width] else None
    if not isinstance(code, str | bytes | list) or len(code) > 2 * height * width + 8:
        return None
    return code if isinstance(code, list) else numbers_in(as_bytes(code))


def as_bytes(code: str | bytes) -> bytes:
    """The characters of a code."""
    return code.encode("ascii", "replace") if isinstance(code, str) else code


def rle_case(rng: random.Random, folder: Path) -> str:
    """A damaged code between good ones."""
    height, width = rng.choice([(1, 1), (6, 8), (6, 8), (40, 33), (9, 300)])
    first, text, other = some_masks(rng, 3, (height, width)).to_rle()
    segmentation = damaged_code(text, other, rng)
    if isinstance(segmentation, list) or rng.random() < 0.7:
        segmentation = {"size": [height, width], "counts": segmentation}
        if rng.random() < 0.1:
            segmentation = mutated(segmentation, rng)
    masks = from_rle(height, width, [first, segmentation, other])
    check_masks(masks)
    counts = counts_of(segmentation, height, width)
    is_good = fills(counts, height * width)
    expect(masks.count == 2 + is_good, "a good code is refused" if is_good else "a bad one taken")
    texts = masks.to_rle()
    expect((texts[0], texts[-1]) == (first, other), "damage has reached another mask")
    if not is_good:
        return "refused"
    ours = masks.select(np.array([1])).sample(np.arange(height), np.arange(width))[0]
    size = [height, width]
    theirs = coco.frPyObjects({"size": size, "counts": counts}, height, width)
    expect(np.array_equal(coco.decode(theirs), ours), "pycocotools decodes another mask")
    code = segmentation.get("counts") if isinstance(segmentation, dict) else segmentation
    # Of seven groups, the last is shifted out of 32 bits there.
    if not isinstance(code, list) and not re.search(b"[P-o]{6}", as_bytes(code)):
        theirs = {"size": size, "counts": code}
        expect(np.array_equal(coco.decode(theirs), ours), "pycocotools reads another mask")
    return "mask"


# --- JSON documents and PNGs


def segmentations(rng: random.Random) -> list[object]:
    """Of every kind."""
    codes: list[object] = []
    for text in some_masks(rng, 3, SIZE).to_rle():
        counts = text.decode() if rng.random() < 0.7 else numbers_in(text)
        codes.append({"size": list(SIZE), "counts": counts})
    return [*codes, [[2, 1, 6, 1, 6, 4, 2, 4], [0, 0, 3, 0, 0, 3.5]]]


def sa1b(rng: random.Random) -> dict[str, object]:
    """A document in SA-1B's layout."""
    image = {"image_id": 7, "width": SIZE[1], "height": SIZE[0], "file_name": "a.jpg"}
    extra = {"predicted_iou": 0.9, "point_coords": [[1.5, 2.0]], "crop_box": [0, 0, 8, 6]}
    own = [{"id": 1, "segmentation": code, "area": 3, **extra} for code in segmentations(rng)]
    return {"image": image, "annotations": own}


def instances(rng: random.Random) -> dict[str, object]:
    """A COCO instances document."""
    image = {"id": 3, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}
    own = [
        {"id": at, "image_id": 3, "category_id": 1, "iscrowd": at % 2, "segmentation": code}
        for at, code in enumerate(segmentations(rng))
    ]
    return {"images": [image, {"id": "x", "file_name": "in/b.jpg"}], "annotations": own}


def panoptic(rng: random.Random) -> dict[str, object]:
    """A COCO panoptic document."""
    images = [{"id": 3, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}]
    own = {"image_id": 3, "file_name": "segments.png", "segments_info": [{"id": 300}]}
    return {"images": images, "annotations": [own]}


def damaged_json(document: object, rng: random.Random) -> bytes:
    """The text of a document in which something is wrong."""
    if rng.random() < 0.6:
        return json.dumps(mutated(document, rng)).encode()
    text = json.dumps(document).encode()
    if rng.random() < 0.03:
        depth = rng.choice([10, 100, 900, 990, 1000, 50_000])
        at = rng.choice([index for index, character in enumerate(text) if character in b"[0123"])
        return text[:at] + b"[" * depth + b"]" * depth + text[at:]
    return damaged(text, text, rng)


def png(pixels: np.ndarray, rng: random.Random) -> bytes:
    """A PNG, damaged or not."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    content = buffer.getvalue()
    return damaged(content, content, rng) if rng.random() < 0.7 else content


def json_case(rng: random.Random, folder: Path) -> str:
    """A damaged document of one of the kinds."""
    if rng.random() < 0.1:
        return manifest_case(rng, folder)
    photo = Photo(folder / "photos" / "a.jpg", Path("a"))
    generator = np.random.default_rng(rng.getrandbits(32))
    match rng.randrange(6):
        case 0 | 1:
            path = folder / "sa"
            write(path / "a.json", damaged_json(sa1b(rng), rng))
        case 2 | 3:
            path = write(folder / "instances.json", damaged_json(instances(rng), rng))
        case 4:
            path = write(folder / "panoptic.json", damaged_json(panoptic(rng), rng))
            pixels = generator.integers(0, 3, (*SIZE, 3)).astype(np.uint8)
            write(folder / "segments.png", png(pixels, rng))
        case _:
            path = folder / "maps"
            kind = rng.choice([np.uint8, np.uint16])
            write(path / "a.png", png(generator.integers(0, 300, SIZE).astype(kind), rng))
    reader = open_masks(path, [photo], details=True)
    masks = reader(photo, SIZE)
    read = getattr(reader, "with_details", reader)
    detailed = read(photo, SIZE)
    if masks is None:
        return "no masks"
    check_masks(masks)
    check_masks(detailed)
    expect(masks.to_rle() == detailed.to_rle(), "details change masks")
    row = make_row("a.jpg", detailed)
    parse_details(row.details, masks.count, path)
    if row.details.isdigit():
        return "masks, details lost"
    document = sa1b_document(detailed, {})
    expect(len(json.dumps(document)) > 0, "the document cannot be written")
    return "masks"


def manifest_case(rng: random.Random, folder: Path) -> str:
    """A damaged manifest of a store."""
    rounds = [{"photos": 2, "photos_sha256": "0", "shard_size": 256, "first_shard": 0}]
    document = {"format": "pixelclip-masks", "version": 2, "source": "sam", "settings": {"a": 1}}
    text = damaged_json({**document, "rounds": rounds, "versions": {"numpy": "2"}}, rng)
    write(folder / "store" / "masks.json", text)
    read_manifest(folder / "store")
    return "a manifest"


# --- Parquet shards


@cache
def good_shard(number: int) -> bytes:
    """The bytes of a shard."""
    rng = random.Random(number)
    rows = []
    for index in range(rng.randrange(1, 7)):
        masks = some_masks(rng, rng.randrange(5), SIZE)
        own = tuple({"stability_score": 0.5, "id": at} for at in range(masks.count))
        rows.append(make_row(f"in/{index}.jpg", replace(masks, details=own)))
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder), 0, rows, [("b.jpg", "cannot be read")])
        return shard_path(Path(folder), 0).read_bytes()


def hostile_shard(rng: random.Random) -> bytes:
    """A shard that is whole but whose rows are not what they should be."""
    rows = []
    names = ["", ".", "..", "/", "/..", "../../x", "/%2e%2e/%2e%2e/x", "/%00", "a\0b", "a/../../b",
             "x" * 5000, "/%FF", "a.jpg", "a", "a.png", "in/a.jpg"]  # fmt: skip
    for name in rng.sample(names, rng.randrange(1, 5)):
        texts = some_masks(rng, rng.randrange(4), SIZE).to_rle()
        odd_sizes = [(0, 5), (-1, -48), (2**31 - 1, 2), (2**16, 2**16), (2**15, 2**14)]
        height, width = rng.choice([*[SIZE] * 15, *odd_sizes])
        row = {
            "photo": name,
            "height": height,
            "width": width,
            "counts": [damaged(t, t, rng) if rng.random() < 0.3 else t for t in texts],
            "scores": [rng.choice([0.5, 1.0, float("nan"), float("inf"), -3.0]) for _ in texts],
            "areas": [rng.choice([3, -1, 2**62]) for _ in texts],
            "details": hostile_details(len(texts), rng),
        }
        if rng.random() < 0.1:
            row["scores"] = [*row["scores"], 0.5]
        rows.append(row)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=rng.randrange(1, 5))
        if rng.random() < 0.5:
            failures = damaged_json([["b.jpg", "cannot be read"]], rng)
            writer.add_key_value_metadata({FAILURES: failures})
    return bytes(sink.getvalue())


def hostile_details(count: int, rng: random.Random) -> str:
    """The text of a row's details, right or wrong."""
    own = sa1b(rng) | {"annotations": [{"segmentation": {"counts": None}} for _ in range(count)]}
    match rng.randrange(4):
        case 0:
            return ""
        case 1:
            return json.dumps(rng.choice([own, own["annotations"], count, ODD[-1]]))
        case _:
            return damaged_json(own, rng).decode("utf-8", "replace")


def shard_case(rng: random.Random, folder: Path) -> str:
    """A damaged shard, or a hostile one, read and exported."""
    content = hostile_shard(rng)
    if rng.random() < 0.5:
        content = damaged(good_shard(rng.randrange(20)), good_shard(rng.randrange(20)), rng)
    store_dir, out_dir = folder / "shards", folder / "exports" / "out"
    write_manifest(store_dir, {})
    path = write(shard_path(store_dir, 0), content)
    with suppress(PixelClipError):
        shard_failures(path)
    store = MaskStore(store_dir)
    with suppress(PixelClipError):
        stored_photos(store)
    photos = [Photo(Path(name), Path(name)) for name in store.photos() if Path(name).name]
    for photo in photos:
        with suppress(PixelClipError):
            masks, bare = store.with_details(photo), store(photo, SIZE)
            if masks is not None and bare is not None:
                check_masks(masks)
                expect(masks.to_rle() == bare.to_rle(), "details change masks")
    done = export_sa1b(store, photos, out_dir)
    export_labels(store, photos, out_dir)
    export_coco(store, photos, out_dir / "coco.json")
    json.loads((out_dir / "coco.json").read_bytes())
    expect(list(out_dir.parent.iterdir()) == [out_dir], "a file lies outside the folder")
    expect(done.photos + len(done.left_out) == len(photos), "a photo got lost")
    shutil.rmtree(out_dir)
    return "masks" if done.photos else "no masks"


# --- as large as they may be


def large_json(rng: random.Random) -> bytes:
    """A document in SA-1B's layout at the limits of what is read."""
    code = '{"segmentation": {"size": [4000, 4000], "counts": %s}}'
    own = rng.choice(
        [
            "[]," * 5_000_000 + "[]",
            '{"a": [' + "{}," * 5_000_000 + "{}]}",
            ",".join([code % '"0"'] * 65_000),
            code % f'"111{"0" * 8_000_000}"',
            code % f"[{'1,' * 8_000_000}1]",
            ",".join(['{"segmentation": [[0,0,4000,4000,0.5,3999]]}'] * 4000),
            '{"segmentation": [[' + "1," * 8_000_000 + "1]]}",
        ]
    )
    return f'{{"annotations": [{own}]}}'.encode()


def large_shard(path: Path, rng: random.Random) -> None:
    """A shard with a column at the limits of what is read, or beyond."""
    megabytes = rng.choice([1, 8, 60, 120, 250])
    text = "0" * (megabytes * 2**20)
    row = Row("a.jpg", *LARGE, counts=[], scores=[], areas=[])
    match rng.randrange(3):
        case 0:
            row = row._replace(photo=text)
        case 1:
            row = row._replace(details=text)
        case _:
            row = row._replace(counts=[b"0" * 2**20] * megabytes, scores=[1.0] * megabytes)
    write_shard(path, 0, [row])


def large_case(rng: random.Random, folder: Path) -> str:
    """A large file; another process writes it, so that only reading counts."""
    photo = Photo(Path("a.jpg"), Path("a"))
    if rng.random() < 0.5:
        path = write(folder / "large-json" / "a.json", large_json(rng)).parent
        masks = open_masks(path, [photo]).with_details(photo, LARGE)
        return "masks" if masks.count else "no masks"
    large = folder / "large"
    write_manifest(large, {})
    writer = get_context("fork").Process(target=large_shard, args=(large, rng))
    writer.start()
    writer.join()
    masks = MaskStore(large).with_details(photo)
    return "no masks" if masks is None or not masks.count else "masks"


# --- all of them


CASES: dict[str, Callable[[random.Random, Path], str]] = {
    "rle": rle_case,
    "json": json_case,
    "shard": shard_case,
    "large": large_case,
}
SHARES = {"rle": 1, "json": 1, "shard": 20, "large": 2000}  # a case of so many


def outcome_of(kind: str, seed: int, number: int, folder: Path) -> str:
    """What came of a case: masks, none, or the name of an error of ours.

    Raises:
        AssertionError: it is not as promised.
        Exception: likewise, whatever a reader let through.
    """
    try:
        return CASES[kind](random.Random(f"{seed} {kind} {number}"), folder)
    except PixelClipError as error:
        expect("\n" not in str(error) and str(error) != "", f"a bad message: {error}")
        return type(error).__name__


def write(path: Path, content: bytes) -> Path:
    """A file, overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def prepare(folder: Path) -> Path:
    """The folder with the photo that the documents are of."""
    (folder / "photos").mkdir()
    Image.new("RGB", SIZE[::-1]).save(folder / "photos" / "a.jpg")
    return folder


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="__array__")  # pycocotools'
    failed = 0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = prepare(Path(name))
        for kind in options.kinds:
            count = max(1, options.count // SHARES[kind])
            started, outcomes = time.perf_counter(), Counter[str]()
            for number in range(options.first, options.first + count):
                try:
                    outcomes[outcome_of(kind, options.seed, number, folder)] += 1
                except Exception as error:  # that is what is looked for
                    failed += 1
                    line = f"FAILED --kinds {kind} --seed {options.seed} --first {number}: "
                    if failed <= MAX_LINES:
                        print(f"{line}{error!r:.300}", flush=True)
            seconds = time.perf_counter() - started
            print(f"{kind}: {count} cases in {seconds:.0f} s: {dict(outcomes)}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e6:.0f} MB (limit {MAX_MEMORY / 1e6:.0f}); {failed} failed")
    sys.exit(failed > 0 or peak > MAX_MEMORY)


if __name__ == "__main__":
    main()
