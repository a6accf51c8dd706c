"""Promise: echocardiograms are deterministic, exactly labelled, truthfully captioned, parted by patient; speckle."""

import csv

import numpy as np
import pytest
from PIL import Image
from runs import tree

from segcn.cli import run_command
from segcn.data.metadata import check_split, read_split
from segcn.samples.echo import (
    BACKGROUND,
    DENSITY,
    DEPTHS,
    ECHO_PALETTE,
    IMAGES_OF_A_PATIENT,
    PHASES,
    QUALITIES,
    VENTRICLE,
    VIEWS,
    draw_echo,
    draw_heart,
    draw_scan,
    envelope,
    scattered,
)
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def echoes():
    return [draw_echo(0, index) for index in range(40)]


def test_an_image_is_a_function_of_seed_and_index(echoes):
    again = draw_echo(0, 7)
    assert np.array_equal(again.image, echoes[7].image) and np.array_equal(again.mask, echoes[7].mask)
    assert (again.caption, again.more) == (echoes[7].caption, echoes[7].more)
    assert len({echo.image.tobytes() for echo in echoes}) == 40
    assert not np.array_equal(draw_echo(1, 0).image, echoes[0].image)
    small = draw_echo(0, 7, resolution=64)
    assert (small.image.shape, small.mask.shape, small.caption) == ((64, 64, 3), (64, 64), again.caption)
    assert small.image.dtype == small.mask.dtype == np.uint8


def test_images_are_grey_and_masks_hold_the_four_classes(echoes):
    for echo in echoes:
        assert (echo.image == echo.image[..., :1]).all()
        pixels = np.bincount(echo.mask.ravel(), minlength=ECHO_PALETTE.num_classes)
        assert len(pixels) == 4 and (pixels >= 100).all(), pixels
        assert (echo.mask[echo.image[..., 0] == 0] == BACKGROUND).mean() > 0.8  # black: outside of the sector, mostly
    masks = np.stack([echo.mask for echo in echoes])
    strangers = np.roll(masks, IMAGES_OF_A_PATIENT, axis=0)
    heart = (masks > 0) | (strangers > 0)
    assert (masks == strangers)[heart].mean() < 0.6  # a mask says where, as hearts differ


def test_walls_are_brighter_than_cavities(echoes):
    for echo in echoes:
        cavity, wall = (echo.image[..., 0][echo.mask == label].mean() for label in (1, 2))
        assert wall > cavity + 8


def test_captions_say_view_phase_and_quality(echoes):
    for index, echo in enumerate(echoes):
        expected = VIEWS[index // 2 % 2], PHASES[index % 2], echo.quality
        assert (echo.view, echo.phase) == expected[:2] and echo.patient == index // 4
        assert all(word in echo.caption for word in expected)
        assert not any(name in echo.caption for name in ECHO_PALETTE.names)
        assert tuple(echo.more[name] for name in ("view", "phase", "quality")) == expected
    assert {echo.quality for echo in echoes} == set(QUALITIES)
    assert len({echo.more["patient"] for echo in echoes}) == 10


def test_the_heart_of_a_patient_contracts(echoes):
    for diastole, systole in zip(echoes[::2], echoes[1::2], strict=True):
        assert diastole.patient == systole.patient and diastole.quality == systole.quality
        assert (systole.mask == VENTRICLE).sum() < (diastole.mask == VENTRICLE).sum()
    for patient in range(50):
        for view in range(len(VIEWS)):
            early, late = (draw_heart(3, patient, view, phase)[0] for phase in range(2))
            assert late.length < early.length and late.half < early.half and late.wall > early.wall
            assert late.atrium_length > early.atrium_length and late.atrium_half > early.atrium_half
            assert late.closed == 1 and (late.x, late.tilt) == (early.x, early.tilt)


def test_fully_developed_speckle_is_rayleigh_and_sparse_speckle_is_not():
    """Mean over standard deviation 1.91 (Burckhardt 1978, doi:10.1109/T-SU.1978.30978), and unit mean power."""
    scan = draw_scan(np.random.default_rng(0), 0, 150.0)
    silent = np.random.default_rng(1), np.zeros((DEPTHS, 144), complex)
    assert envelope(*silent, scan).max() < 0.2  # noise alone
    found = {}
    for name, density in (*DENSITY.items(), ("single", 0.01)):
        cells = scattered(np.random.default_rng(2), (DEPTHS, 144), density)
        inner = envelope(np.random.default_rng(3), cells, scan)[80:-80, 16:-16]
        assert (inner**2).mean() == pytest.approx(1, abs=0.12 if name != "single" else 0.5)
        found[name] = inner.mean() / inner.std()
    assert found["tissue"] == pytest.approx(1.913, abs=0.1) and found["single"] < 1.6


def test_written_folder_reads_back_and_no_patient_is_on_both_sides(tmp_path):
    words = ["samples", "echo", str(tmp_path / "set"), "--count", "10", "--test", "6", "--resolution", "64"]
    run_command(words)
    patients = {}
    for side, rows in (("train", 10), ("test", 6)):
        split = read_split(tmp_path / "set", side)
        check_split(split)
        with split.metadata.open() as file:
            patients[side] = [row["patient"] for row in csv.DictReader(file)]
        assert len(split) == rows and len(set(patients[side])) == -(-rows // IMAGES_OF_A_PATIENT)
    assert not set(patients["train"]) & set(patients["test"])
    assert split.palette.names[VENTRICLE] == "left ventricle"
    image = Image.open(tmp_path / "set/train/images/000000.png")
    assert image.mode == "RGB" and image.size == (64, 64)
    content = tree(tmp_path / "set")
    run_command([*words[:2], str(tmp_path / "again"), *words[3:]])
    assert tree(tmp_path / "again") == content
    with pytest.raises(UserError, match="another set"):
        run_command([*words, "--seed", "1"])


def test_the_doctor_finds_no_fault(tmp_path, capsys):
    run_command(["samples", "echo", str(tmp_path / "set"), "--count", "12", "--test", "4", "--resolution", "64"])
    with pytest.raises(SystemExit) as end:
        run_command(["validate", str(tmp_path / "set"), "--output_dir", str(tmp_path / "doctor")])
    print(capsys.readouterr().out)
    assert end.value.code == 0
