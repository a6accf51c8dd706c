import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from segcn import models, widgets
from segcn.arguments import make
from segcn.config import SampleConfig
from segcn.errors import UserError
from segcn.labels import Label, Palette
from segcn.masks import read_mask
from segcn.pipeline import Painter
from segcn.records import read_split

SETTINGS = make(SampleConfig, "tiny", num_inference_steps=2)


@pytest.fixture(scope="module")
def split(landscapes):
    return read_split(landscapes, "test")


@pytest.fixture(scope="module")
def painter(random_base, split):
    base = models.load_base(random_base)
    return Painter(base, models.make_controlnet(base.unet).eval(), split.palette, "fresh")


@pytest.fixture
def panel(painter, split, tmp_path):
    return widgets.panel(painter, split, tmp_path / "painted", SETTINGS)


def wait(panel):
    panel.worker.join(120)
    assert not panel.worker.is_alive()


def pair(side=16, seed=0):
    noise = np.random.default_rng(seed)
    return noise.integers(0, 256, (side, side, 3), np.uint8), noise.integers(0, 9, (side, side), np.uint8)


def test_a_saved_row_is_read_back_with_identical_ids(tmp_path, split):
    image, mask = pair()
    mask[0] = 255
    assert widgets.save_row(tmp_path / "set", image, mask, "a hill, at dusk", split.palette) == 0
    row = read_split(tmp_path / "set")[0]
    assert row.caption == "a hill, at dusk"
    assert (read_mask(row.mask, split.palette) == mask).all() and (np.asarray(Image.open(row.image)) == image).all()


def test_saving_twice_overwrites_nothing(tmp_path, split):
    pairs = [pair(seed=seed) for seed in range(3)]
    rows = [widgets.save_row(tmp_path, *one, f"caption {k}", split.palette) for k, one in enumerate(pairs)]
    read = read_split(tmp_path)
    assert rows == [0, 1, 2] and [record.caption for record in read.records] == ["caption 0", "caption 1", "caption 2"]
    for record, (_, mask) in zip(read.records, pairs, strict=True):
        assert (read_mask(record.mask, split.palette) == mask).all()


def test_files_that_no_row_names_are_not_overwritten(tmp_path, split):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000004.png").write_bytes(b"mine")
    widgets.save_row(tmp_path, *pair(), "caption", split.palette)
    assert (tmp_path / "images" / "000004.png").read_bytes() == b"mine"
    assert read_split(tmp_path)[0].image.name == "000005.png"


def test_a_row_that_would_spoil_the_data_set_is_refused(tmp_path, split):
    widgets.save_row(tmp_path, *pair(), "caption", split.palette)
    before = (tmp_path / "metadata.csv").read_bytes()
    other = Palette((Label(0, "cat", (1, 2, 3)),))
    with pytest.raises(UserError, match="caption"):
        widgets.save_row(tmp_path, *pair(), "  ", split.palette)
    with pytest.raises(UserError, match="palette"):
        widgets.save_row(tmp_path, *pair(), "caption", other)
    assert (tmp_path / "metadata.csv").read_bytes() == before


def test_foreign_columns_are_not_dropped(tmp_path, split):
    widgets.save_row(tmp_path, *pair(), "caption", split.palette)
    metadata = tmp_path / "metadata.csv"
    lines = metadata.read_text().splitlines()
    metadata.write_text(f"{lines[0]},author\n{lines[1]},me\n")
    with pytest.raises(UserError, match="author"):
        widgets.save_row(tmp_path, *pair(), "caption", split.palette)


def test_picking_a_row_shows_its_mask_and_caption(panel, split):
    first = panel.mask_view.value
    panel.row.value = 1
    assert panel.prompt.value == split[1].caption and panel.mask_view.value != first


def test_generate_paints_off_the_main_thread_and_save_appends(panel, split):
    blank = panel.image_view.value
    panel.row.value = 2
    panel.prompt.value = "a winter landscape"
    panel.generate_button.click()
    assert panel.generate_button.disabled and not panel.stop_button.disabled
    panel.row.value = 0  # what is saved belongs to what was painted, not to what is picked by now
    wait(panel)
    assert panel.image_view.value != blank and panel.progress.value == 2 and not panel.save_button.disabled
    panel.save_button.click()
    panel.save_button.click()
    saved = read_split(panel.save_dir)
    assert [record.caption for record in saved.records] == ["a winter landscape"] * 2
    assert (read_mask(saved[1].mask, split.palette) == read_mask(split[2].mask, split.palette)).all()


def test_the_same_seed_paints_the_same_and_another_seed_another(painter, split):
    mask = read_mask(split[0].mask, split.palette)
    first, again = (widgets.paint_one(painter, mask, "a lake", SETTINGS) for _ in range(2))
    other = widgets.paint_one(painter, mask, "a lake", dataclasses.replace(SETTINGS, seed=1))
    assert (first == again).all() and (first != other).any() and first.shape == (*mask.shape, 3)


def test_html_in_a_prompt_stays_text(panel):
    prompt = "<img src=x onerror=alert(1)> & <b>a lake</b>"
    panel.prompt.value = prompt
    panel.generate_button.click()
    wait(panel)
    panel.save_button.click()
    assert read_split(panel.save_dir)[0].caption == prompt
    kinds = {type(widget).__name__ for widget in every_widget(panel)}
    assert not any("HTML" in kind for kind in kinds)
    assert not any(getattr(widget, "description_allow_html", False) for widget in every_widget(panel))


def test_an_error_is_shown_in_the_status(panel, monkeypatch):
    def fails(*_):
        raise UserError("no room for <b>this</b>")

    monkeypatch.setattr(widgets, "paint_one", fails)
    panel.generate_button.click()
    wait(panel)
    assert panel.status.value == "Error: no room for <b>this</b>"
    assert not panel.generate_button.disabled and panel.save_button.disabled


def test_stop_keeps_the_old_picture(panel, monkeypatch):
    def slow(painter, mask, prompt, settings, on_step):
        while not on_step(1):
            time.sleep(0.01)
        return np.zeros((*mask.shape, 3), np.uint8)

    monkeypatch.setattr(widgets, "paint_one", slow)
    blank = panel.image_view.value
    panel.generate_button.click()
    panel.stop_button.click()
    wait(panel)
    assert panel.status.value == "Stopped." and panel.image_view.value == blank and panel.painted is None


def every_widget(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every_widget(child)
