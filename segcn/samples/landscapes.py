"""Painted landscapes with exact masks and captions: the built-in sample set.

Season and time of day are told by the caption alone and the layout by the mask alone.
"""

import hashlib
import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.errors import UserError
from segcn.labels import Label, Palette, write_mask
from segcn.progress import Progress
from segcn.records import write_metadata
from segcn.samples.painting import paint_scene
from segcn.samples.scene import compose
from segcn.samples.things import CLOUD, HOUSE, MOUNTAIN, TREE

PALETTE = (
    (0, "sky", (70, 130, 180)),
    (1, "cloud", (220, 220, 220)),
    (2, "sun", (255, 210, 40)),
    (3, "mountain", (122, 98, 88)),
    (4, "grass", (80, 160, 70)),
    (5, "water", (30, 90, 200)),
    (6, "road", (90, 90, 90)),
    (7, "tree", (20, 85, 40)),
    (8, "house", (195, 60, 50)),
)
SEASONS = ("spring", "summer", "autumn", "winter")
TIMES = {"dawn": "at dawn", "day": "by day", "dusk": "at dusk", "night": "at night"}


RECORD = "samples.json"


@dataclass(frozen=True)
class Landscape:
    """A picture (uint8 [R, R, 3]), its class ids (uint8 [R, R]) and what its caption says."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    season: str
    time: str


def contents(things):
    """What the caption names, in the order it is named."""
    labels = [thing.label for thing in things]
    kinds = {thing.label: thing.kind for thing in things}
    named = ["clouds"] if CLOUD in labels else []
    named += ["mountains"] if MOUNTAIN in labels else []
    named += [f"a {thing.kind}" for thing in things if thing.kind in ("lake", "river", "road")]
    if TREE in labels:
        tree = "pine tree" if kinds[TREE] == "pine" else "leafy tree"
        named.append(f"a {tree}" if labels.count(TREE) == 1 else f"{tree}s")
    if HOUSE in labels:
        named.append(f"a {kinds[HOUSE]} house" if labels.count(HOUSE) == 1 else f"{kinds[HOUSE]} houses")
    return named


def describe(season, time, named):
    """The caption: "a winter landscape at dusk with mountains, a lake and a red house"."""
    article = "an" if season[0] in "aeiou" else "a"
    caption = f"{article} {season} landscape {TIMES[time]}"
    if not named:
        return caption
    listed = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
    return f"{caption} with {listed}"


def paint(seed, index, resolution=128):
    """Paint landscape `index` of the set `seed`; a pure function of its arguments."""
    season = SEASONS[int(np.random.default_rng([seed, index, 0]).integers(len(SEASONS)))]
    time = list(TIMES)[int(np.random.default_rng([seed, index, 1]).integers(len(TIMES)))]
    horizon, things = compose(np.random.default_rng([seed, index, 2]))
    rng = np.random.default_rng([seed, index, 3])
    image, mask = paint_scene(rng, resolution, horizon, things, season, time)
    return Landscape(image, mask, describe(season, time, contents(things)), season, time)


@dataclass(frozen=True)
class SampleSet:
    """What fixes every byte of a written set; kept in samples.json beside it."""

    count: int  # pairs in the one folder, or in train
    resolution: int  # px
    seed: int
    test: int | None  # pairs in test; None writes one folder
    kind: str = "landscapes"
    version: int = 1  # changes whenever a pixel does

    def folders(self, out):
        """(folder, seed of its pictures, number of pairs) of every split."""
        if self.test is None:
            return [(out, self.seed, self.count)]
        sizes = {"train": self.count, "test": self.test}
        return [(out / name, split_seed(self.seed, name), size) for name, size in sizes.items()]


def split_seed(seed, name):
    """Seed of a split's pictures: hashed with its name, so that train and test never share a picture."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def palette():
    """The palette of the nine classes."""
    return Palette(tuple(Label(*entry) for entry in PALETTE))


def pair_names(index):
    """(image, mask) file names of pair `index` within its folder."""
    return f"images/{index:06d}.png", f"masks/{index:06d}.png"


def write_landscapes(out, count, resolution=128, seed=0, test=None, workers=None):
    """Write `count` pairs to `out`, or with `test` to out/train and out/test; returns `out`.

    A finished set of the same settings is reused and an unfinished one painted again; UserError if the
    settings make no sense or the folder holds something else.
    """
    out, samples = Path(out), SampleSet(count, resolution, seed, test)
    check_settings(samples)
    if stands_complete(out, samples):
        print(f"{out}: reused, this set already stands here")
        return out
    out.mkdir(parents=True, exist_ok=True)
    write_record(out, samples, finished=False)
    palette().save(out / "palette.json")
    for folder, folder_seed, size in samples.folders(out):
        write_folder(folder, folder_seed, size, resolution, workers)
    write_record(out, samples, finished=True)
    return out


def check_settings(samples):
    """UserError for counts, resolutions and seeds that make no sense."""
    if samples.count < 1 or (samples.test is not None and samples.test < 1):
        raise UserError(f"--count {samples.count} --test {samples.test}: expected at least 1 pair in each folder")
    if not 32 <= samples.resolution <= 1024:
        raise UserError(f"--resolution {samples.resolution}: expected 32 to 1024 px")
    if samples.seed < 0:
        raise UserError(f"--seed {samples.seed}: expected 0 or more")


def stands_complete(out, samples):
    """Whether `out` holds this very set, finished; UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        finished = record.pop("finished")
    except (OSError, ValueError, AttributeError, KeyError):
        raise UserError(f"{out}: holds something else than landscapes; choose another folder") from None
    if record != asdict(samples):
        raise UserError(f"{out}: holds another set, {record}; choose another folder or delete this one")
    return finished and all(folder_complete(folder, size) for folder, _, size in samples.folders(out))


def folder_complete(folder, size):
    """Whether the metadata and every image and mask are there."""
    names = [name for index in range(size) for name in pair_names(index)]
    return all((folder / name).is_file() for name in ["metadata.csv", *names])


def write_record(out, samples, finished):
    """Record the settings, and whether every file is written, in samples.json."""
    text = json.dumps({**asdict(samples), "finished": finished}, indent=2) + "\n"
    staged = out / f".{RECORD}"
    staged.write_text(text, encoding="utf-8")
    staged.replace(out / RECORD)


def write_folder(folder, seed, count, resolution, workers=None):
    """Paint pairs 0..count-1 with all cores and write images/, masks/ and metadata.csv."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = [(folder, seed, index, resolution) for index in range(count)]
    workers = min(workers or os.cpu_count() or 1, 1 + count // 32)
    if workers == 1:
        captions = collect(map(write_pair, jobs), folder, count)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            captions = collect(pool.imap(write_pair, jobs, chunksize=8), folder, count)
    print(f"{folder}: {count} pairs painted", flush=True)
    write_metadata(folder, [(*pair_names(index), caption) for index, caption in enumerate(captions)])


def collect(captions, folder, count):
    """The captions as a list, saying now and then how many pairs stand."""
    told, collected = Progress(f"{folder.name}: painted", count), []
    for caption in captions:
        collected.append(caption)
        told(len(collected))
    return collected


def write_pair(job):
    """Paint and write one pair; returns its caption. In a process of its own, hence one argument."""
    folder, seed, index, resolution = job
    landscape = paint(seed, index, resolution)
    image_name, mask_name = pair_names(index)
    Image.fromarray(landscape.image).save(folder / image_name)
    write_mask(folder / mask_name, landscape.mask, palette())
    return landscape.caption
