"""Photos per second of each mask source, against the number of worker processes.

    python benchmarks/masks.py PHOTOS [--photos 192] [--workers 1 2] [--runs 3] [--json FILE]
                               [--sources superpixels mini ...]

Each run is the whole job in a process of its own, with start, model and store: what a person waits
for. A second job of a single photo gives the time to start, which is subtracted for the second
figure: what each further photo costs. All runs alternate, medians are given, and the stores that
different numbers of workers have made are compared byte by byte.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from pixelclip.photos import find_photos


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--photos", type=int, default=192)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sources", nargs="+", default=["superpixels", "mini"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos = [photo.path.resolve() for photo in find_photos([options.folder])][: options.photos]
    cases = [(source, workers) for source in options.sources for workers in options.workers]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    starts: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        some, one = Path(folder) / "some", Path(folder) / "one"
        _link(photos, some)
        _link(photos[:1], one)
        for number in range(options.runs):
            for source, workers in cases:
                out = Path(folder) / f"{source}-{workers}-{number}"
                starts[source, workers].append(_run(one, Path(f"{out}-one"), source, workers))
                seconds[source, workers].append(_run(some, out, source, workers))
        for source in options.sources:
            stores = [_content(Path(folder) / f"{source}-{n}-0") for n in options.workers]
            assert all(store == stores[0] for store in stores), f"{source}: stores differ"
    rows = []
    print(f"{len(photos)} photos of {options.folder}, {os.cpu_count()} cores, {platform.machine()}")
    print("| source | workers | photos/s, whole job | photos/s, without start |")
    print("| --- | --- | --- | --- |")
    for case in cases:
        whole, start = median(seconds[case]), median(starts[case])
        row = (*case, len(photos) / whole, (len(photos) - 1) / (whole - start))
        rows.append({"case": case, "seconds": seconds[case], "starts": starts[case]})
        print("| {} | {} | {:.2f} | {:.2f} |".format(*row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _link(photos: list[Path], folder: Path) -> None:
    folder.mkdir()
    for number, photo in enumerate(photos):
        (folder / f"{number:06d}{photo.suffix}").symlink_to(photo)


def _run(photos: Path, out: Path, source: str, workers: int) -> float:
    """Seconds of the command."""
    arguments = ["masks", str(photos), "-o", str(out), "--source", source]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "pixelclip", *arguments, "--workers", str(workers), "-q"], check=True
    )
    return time.monotonic() - began


def _content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


if __name__ == "__main__":
    main()
