"""Promise: the panel generates from what is drawn, keeps what is to be saved, and no text of it becomes HTML."""

import dataclasses
import io
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SLACK
from PIL import Image

from segcn.data.masks import colorize, read_mask, write_mask
from segcn.data.metadata import read_split, save_row
from segcn.data.palette import Label, Palette
from segcn.evaluate.metrics import confusion_matrix, iou
from segcn.generate import infer
from segcn.generate.config import SampleConfig
from segcn.generate.infer import read_settings
from segcn.generate.pipeline import load_pipeline
from segcn.models.segmenter import build_segmenter
from segcn.notebook import canvas, gallery, widgets
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE

SETTINGS = make(SampleConfig, "tiny", num_inference_steps=2)
HOUSE = 8


@pytest.fixture(scope="module")
def split(landscapes):
    return read_split(landscapes, "test")


@pytest.fixture
def panel(pipeline, split, tmp_path, monkeypatch):
    monkeypatch.setattr(widgets, "SETTLING", 0)
    return widgets.Panel(pipeline, split, tmp_path / "saved", SETTINGS)


@pytest.fixture
def quick_panel(panel, monkeypatch):
    """A panel whose images are the seed's grey and take no time; each step is announced."""

    def fake_generate(pipeline, masks, captions, rows, settings, size, on_guess):
        image = np.full((1, *size, 3), settings.seed % 256, np.uint8)
        for step in range(settings.num_inference_steps):
            if on_guess(step + 1, lambda: image):
                break
        return image

    monkeypatch.setattr(infer, "generate", fake_generate)
    return panel


def press(panel, button):
    """Press it and wait until the work that it begins is done."""
    button.click()
    wait(panel)


def wait(panel):
    panel.worker.join(120)
    assert not panel.worker.is_alive()


def await_status(panel, text):
    until = time.monotonic() + 60
    while not panel.status.value.startswith(text) and time.monotonic() < until:
        time.sleep(0.001)
    assert panel.status.value.startswith(text), panel.status.value


def brush(panel, mask):
    """A change of the mask as the browser sends it."""
    height, width = mask.shape
    content = {"kind": "drawn", "height": height, "width": width}
    data = {"content": {"data": {"method": "custom", "content": content}}, "buffers": [memoryview(mask.tobytes())]}
    panel.canvas._handle_msg(data)


def images(panel):
    return [card.generated for card in panel.gallery.cards]


def row_mask(split, row):
    return read_mask(split[row].mask, split.palette)


def pair(side=16, seed=0):
    noise = np.random.default_rng(seed)
    return noise.integers(0, 256, (side, side, 3), np.uint8), noise.integers(0, 9, (side, side), np.uint8)


def test_rows_are_appended_with_identical_ids_and_foreign_files_are_kept(tmp_path, split):
    (tmp_path / "images").mkdir()
    for name in ("000004.png", "0_mine.png"):
        (tmp_path / "images" / name).write_bytes(b"mine")
    pairs = [pair(seed=seed) for seed in range(2)]
    pairs[0][1][0] = 255
    assert [save_row(tmp_path, *one, f"a hill, at dusk {k}", split.palette) for k, one in enumerate(pairs)] == [0, 1]
    for row, (image, mask) in enumerate(pairs):
        record = read_split(tmp_path)[row]
        assert record.caption == f"a hill, at dusk {row}" and (read_mask(record.mask, split.palette) == mask).all()
        assert (np.asarray(Image.open(record.image)) == image).all()
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {"000004.png", "0_mine.png", "000005.png", "000006.png"}
    assert (tmp_path / "images" / "000004.png").read_bytes() == b"mine"


def test_a_row_that_would_spoil_the_data_set_is_refused(tmp_path, split):
    other, metadata = Palette((Label(0, "cat", (1, 2, 3)),)), tmp_path / "metadata.csv"
    other.save(tmp_path / "palette.json")
    with pytest.raises(UserError, match="palette"):  # of a folder without rows
        save_row(tmp_path, *pair(), "caption", split.palette)
    assert Palette.load(tmp_path / "palette.json") == other
    (tmp_path / "palette.json").unlink()
    save_row(tmp_path, *pair(), "caption", split.palette)
    header, row = metadata.read_text().splitlines()
    for caption, palette, match in (("  ", split.palette, "caption"), ("caption", other, "palette")):
        with pytest.raises(UserError, match=match):
            save_row(tmp_path, *pair(), caption, palette)
        assert metadata.read_text().splitlines() == [header, row]
    metadata.write_text(f"{header},author\n{row},me\n")
    with pytest.raises(UserError, match="author"):  # a column that would be dropped
        save_row(tmp_path, *pair(), "caption", split.palette)


def test_the_legend_names_every_class_and_what_the_eraser_leaves():
    void = Palette((Label(3, "air", (1, 2, 3)), Label(7, "void", (9, 9, 9), ignore=True)))
    air, left = canvas.canvas_labels(void)
    assert air == {"id": 3, "name": "air", "color": [1, 2, 3]}
    assert left == {"id": 255, "name": "void", "color": [0, 0, 0]}
    own = Palette((Label(0, "Unlabelled", (0, 0, 0)), Label(1, "air", (1, 2, 3))))
    assert canvas.erased(own) == (0, "Unlabelled") and len(canvas.canvas_labels(own)) == 2
    assert canvas.erased(Palette((Label(1, "air", (1, 2, 3)),))) == (255, "unlabelled")


def upload(button, name, content):
    """A file as the browser sends it."""
    data = {"method": "custom", "content": {"name": name}}
    button._handle_msg({"content": {"data": data}, "buffers": [memoryview(content)]})


def test_a_mask_comes_from_a_row_a_path_or_an_upload_and_a_bad_one_changes_nothing(panel, split, tmp_path):
    assert (panel.canvas.mask == row_mask(split, 0)).all()
    panel.picker.row.value = 1
    assert (panel.canvas.mask == row_mask(split, 1)).all() and panel.controls.prompt.value == split[1].caption
    panel.controls.prompt.value = "my own words"
    panel.picker.row.value = 2
    assert panel.controls.prompt.value == "my own words"  # what a person wrote stays
    mask = pair(side=64)[1]
    write_mask(tmp_path / "own.png", mask, split.palette)
    panel.picker.path.value = str(tmp_path / "own.png")
    assert (panel.canvas.mask == mask).all() and panel.controls.prompt.value == "my own words"
    write_mask(tmp_path / "next.png", mask.T.copy(), split.palette)
    upload(panel.picker.upload, "next.png", (tmp_path / "next.png").read_bytes())
    assert (panel.canvas.mask == mask.T).all()
    upload(panel.picker.upload, "<b>empty</b>.png", b"")
    assert "Error: <b>empty</b>.png: the mask cannot be read" in panel.status.value
    for path in ("nowhere.png", str(tmp_path)):
        panel.picker.path.value = path
        await_status(panel, f"Error: {path}")
    assert (panel.canvas.mask == mask.T).all()


def test_a_stroke_is_kept_not_sent_back_and_none_on_a_mask_that_is_gone(panel, split, monkeypatch):
    drawn, sent = row_mask(split, 0), []
    drawn[8:24, 8:24] = HOUSE
    monkeypatch.setattr(panel.canvas, "_send", lambda *message, **_: sent.append(message))
    brush(panel, drawn)
    brush(panel, drawn[:32])
    assert (panel.canvas.mask == drawn).all() and not sent
    panel.picker.again.click()
    assert (panel.canvas.mask == row_mask(split, 0)).all() and len(sent) == 1  # size and ids, at once


def test_generate_works_off_the_main_thread_and_save_appends_it_with_settings_that_give_it_again(
    panel, pipeline, split
):
    drawn = row_mask(split, 2)
    panel.picker.row.value = 2
    drawn[8:24, 8:24] = HOUSE
    brush(panel, drawn)
    panel.controls.prompt.value = "a winter landscape"
    panel.controls.window.value = 0.0, 0.5
    panel.generate_button.click()
    await_status(panel, "Generating")
    panel.picker.row.value = 0  # what is saved belongs to what was drawn, not to what is shown by now
    assert panel.generate_button.disabled and not panel.stop_button.disabled
    wait(panel)
    assert panel.progress.value == 2 and not panel.generate_button.disabled
    (card,) = panel.gallery.cards
    card.save_button.click()
    card.save_button.click()
    assert card.save_button.description == "Row 0" and card.save_button.disabled
    (row,) = read_split(panel.save_dir).records
    assert row.caption == "a winter landscape" and (read_mask(row.mask, split.palette) == drawn).all()
    image = Image.open(row.image)
    assert (np.asarray(image) == card.generated.image).all() and card.image.value[1:4] == b"PNG"
    record = read_settings(row.image)
    assert record["prompt"] == ["a winter landscape"] and record["settings"]["control_guidance_end"] == 0.5
    assert record["seeds"] == [[panel.controls.seed.value, 0]] and record["controlnet"] == "random"
    saved = SampleConfig(**record["settings"])
    orders = [(drawn, row.caption, settings) for settings in (saved, dataclasses.replace(saved, seed=saved.seed + 1))]
    again, other = infer.generate_each(pipeline, orders)
    assert (again.image == card.generated.image).all() and (other.image != again.image).any()


def test_every_press_has_a_new_seed_unless_it_is_locked_and_so_has_every_image_of_a_press(quick_panel):
    seeds = []
    for locked in (False, False, True, True):
        quick_panel.controls.lock.value = locked
        press(quick_panel, quick_panel.generate_button)
        seeds.append(images(quick_panel)[0].settings.seed)
    assert len(set(seeds)) == 2 and seeds[1] == seeds[2] == seeds[3]
    quick_panel.controls.number.value = 3
    press(quick_panel, quick_panel.generate_button)
    first = quick_panel.controls.seed.value
    assert [image.settings.seed for image in images(quick_panel)] == [first, first + 1, first + 2]
    assert quick_panel.progress.value == quick_panel.progress.max == 6
    quick_panel.gallery.save_all.click()
    assert len(read_split(quick_panel.save_dir)) == 3


def test_one_mask_has_four_captions_and_one_caption_four_masks(quick_panel, split):
    last = len(split) - 1
    quick_panel.picker.row.value = last - 1
    press(quick_panel, quick_panel.captions_button)
    found, caption = images(quick_panel), split[last - 1].caption
    assert found[0].caption == caption and len({image.caption for image in found}) == 4
    assert len({image.settings.seed for image in found}) == 1
    assert all((image.mask == row_mask(split, last - 1)).all() for image in found)
    press(quick_panel, quick_panel.masks_button)
    for image, row in zip(images(quick_panel), (last - 1, last, 0, 1), strict=True):
        assert (image.mask == row_mask(split, row)).all() and image.caption == caption


def test_the_settings_are_those_of_the_controls_and_those_far_from_the_usual_are_kept(quick_panel, pipeline, split):
    controls = quick_panel.controls
    chosen = {"steps": 3, "guidance": 4.5, "strength": 0.25, "window": (0.25, 0.75), "guidance_window": (0.0, 0.6),
              "scheduler": "ddim", "negative_prompt": "fog"}  # fmt: skip
    for name, value in chosen.items():
        getattr(controls, name).value = value
    press(quick_panel, quick_panel.generate_button)
    assert images(quick_panel)[0].settings == dataclasses.replace(
        SETTINGS, seed=controls.seed.value, num_inference_steps=3, guidance_scale=4.5,
        controlnet_conditioning_scale=0.25, control_guidance_start=0.25, control_guidance_end=0.75,
        guidance_start=0.0, guidance_end=0.6, scheduler="ddim", negative_prompt="fog",
        controlnet_model_name_or_path="random",
    )  # fmt: skip
    controls.window.value = 0.5, 0.5
    press(quick_panel, quick_panel.generate_button)
    assert "mask acts" in quick_panel.status.value and len(quick_panel.gallery.entries) == 1
    far = {"num_inference_steps": 250, "guidance_scale": 30.0, "controlnet_conditioning_scale": 3.0, "seed": 5}
    kept = dataclasses.replace(SETTINGS, **far)
    assert widgets.Panel(pipeline, split, quick_panel.save_dir, kept).controls.settings() == kept


def test_the_history_leads_back_and_an_old_image_can_be_generated_again(quick_panel, split):
    panel = quick_panel
    press(panel, panel.generate_button)
    first = images(panel)[0]
    panel.picker.row.value = 1
    panel.controls.steps.value = 5
    press(panel, panel.generate_button)
    assert images(panel)[0].caption == split[1].caption and panel.gallery.forward.disabled
    panel.gallery.back.click()
    assert images(panel) == [first] and panel.gallery.back.disabled and panel.gallery.place.value == "1 of 2"
    panel.gallery.cards[0].reuse_button.click()
    assert (panel.canvas.mask == first.mask).all() and panel.controls.prompt.value == split[0].caption
    press(panel, panel.generate_button)
    again = images(panel)[0]
    assert again is not first and again.record == first.record
    shown = panel.gallery
    shown.begin(2)
    shown.add(first)
    shown.back.click()
    shown.add(first)  # what is generated meanwhile does not turn the page
    assert len(shown.cards) == 1 and len(shown.entries[-1]) == 2
    shown.forward.click()
    assert len(shown.cards) == 2 and all(card.image.value for card in shown.cards)


def test_the_mask_is_laid_over_the_image(quick_panel, split):
    press(quick_panel, quick_panel.generate_button)
    (card,) = quick_panel.gallery.cards
    seen = {}
    for view in ("image", "outlines", "classes", "mask"):
        quick_panel.gallery.view.value = view
        seen[view] = card.image.value
    assert len(set(seen.values())) == 4
    shown = np.asarray(Image.open(io.BytesIO(seen["mask"])))
    assert (shown == colorize(row_mask(split, 0), split.palette)).all()


def every_widget(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every_widget(child)


def test_html_in_a_prompt_stays_text(quick_panel):
    prompt = "<img src=x onerror=alert(1)> & <b>a lake</b>"
    quick_panel.controls.prompt.value = prompt
    press(quick_panel, quick_panel.generate_button)
    quick_panel.gallery.save_all.click()
    assert read_split(quick_panel.save_dir)[0].caption == prompt
    kinds = {type(widget).__name__ for widget in every_widget(quick_panel)}
    assert {"Label", "Card", "MaskCanvas"} <= kinds and not any("HTML" in kind for kind in kinds)
    assert not any(getattr(widget, "description_allow_html", False) for widget in every_widget(quick_panel))
    browser = Path(widgets.__file__).with_name("mask_canvas.js").read_text()
    assert not [word for word in ("innerHTML", "insertAdjacentHTML", "eval(") if word in browser]


def test_an_error_is_shown_and_the_panel_goes_on(quick_panel, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no room for <b>this</b>")

    works = infer.generate
    monkeypatch.setattr(infer, "generate", fails)
    press(quick_panel, quick_panel.generate_button)
    assert quick_panel.status.value == "Error: no room for <b>this</b>" and not quick_panel.gallery.cards
    monkeypatch.setattr(infer, "generate", works)
    press(quick_panel, quick_panel.generate_button)
    assert quick_panel.status.value.startswith("Generated 1 of 1")
    quick_panel.controls.prompt.value = ""
    press(quick_panel, quick_panel.generate_button)
    quick_panel.gallery.save_all.click()
    assert "needs a caption" in quick_panel.status.value and not quick_panel.gallery.cards[0].save_button.disabled


def test_stop_keeps_what_there_is_and_a_preview_is_seen_before(panel, monkeypatch):
    def slow(pipeline, masks, captions, rows, settings, size, on_guess):
        first = settings.seed == panel.controls.seed.value
        while not on_guess(1, lambda: np.full((1, *size, 3), 9, np.uint8)) and not first:
            time.sleep(0.01)
        return np.zeros((1, *size, 3), np.uint8)

    seen = []
    monkeypatch.setattr(infer, "generate", slow)
    monkeypatch.setattr(widgets, "PREVIEWS", 0)
    monkeypatch.setattr(panel.gallery, "foresee", seen.append)
    panel.controls.number.value = 3
    panel.generate_button.click()
    await_status(panel, "Generating 2 of 3: step 1 of 2, about ")
    panel.stop_button.click()
    wait(panel)
    assert panel.status.value == "Stopped; 1 of 3 generated, and one as far as it was."
    assert ["stopped" in image.record for image in images(panel)] == [False, True] and (seen[0] == 9).all()
    assert panel.gallery.grid.children == tuple(panel.gallery.cards)  # the preview is gone
    assert panel.stop_button.disabled and not panel.generate_button.disabled


def test_the_preview_is_close_to_the_image_and_a_stopped_image_is_the_preview(pipeline, split):
    guesses, mask = {}, row_mask(split, 0)
    settings = dataclasses.replace(SETTINGS, num_inference_steps=8)
    (whole,) = infer.generate_each(
        pipeline, [(mask, "a lake", settings)], lambda step, guess: guesses.update({step: guess()})
    )
    assert list(guesses) == list(range(1, 9)) and "stopped" not in whole.record
    far = [np.abs(guess[0].astype(int) - whole.image).mean() for guess in guesses.values()]
    assert far[-1] < 1 and far[-1] <= far[0]
    orders = [(mask, "a lake", settings)] * 2
    (part,) = infer.generate_each(pipeline, orders, lambda step, guess: step == 3)
    assert part.record["stopped"] == 3 and (part.image == guesses[3][0]).all()


def test_blank_starts_with_a_class_and_a_mask_without_labels_has_no_effect(panel, split):
    assert panel.picker.background.value == np.bincount(row_mask(split, 0).ravel()).argmax()
    panel.picker.background.value = HOUSE
    panel.picker.blank.click()
    assert (panel.canvas.mask == HOUSE).all() and panel.canvas.mask.shape == row_mask(split, 0).shape
    panel.picker.background.value = 255
    panel.picker.blank.click()
    panel.controls.lock.value = True
    press(panel, panel.generate_button)
    assert "From the text alone: the mask is all unlabelled." in panel.status.value
    (image,) = images(panel)
    size = image.mask.shape
    alone = infer.generate(panel.pipeline, None, [image.caption], [0], image.settings, size)
    assert image.record["without_control"] and (image.image == alone[0]).all()


def test_classes_that_the_mask_holds_and_the_prompt_does_not_are_one_click_away(quick_panel):
    panel = quick_panel
    mask = np.zeros_like(panel.canvas.mask)
    mask[:9], mask[20:30] = HOUSE, 5
    panel.controls.prompt.value = "a winter landscape"
    brush(panel, mask)
    words = ("lake", "house") if "lake" in " ".join(r.caption for r in panel.split.records) else ("river", "house")
    label = panel.add_button.description
    assert label == f"Add to the prompt: {words[0]} and house" and not panel.add_button.layout.display
    panel.add_button.click()
    assert panel.controls.prompt.value == f"a winter landscape, {words[0]} and house"
    assert panel.add_button.layout.display == "none"
    panel.controls.prompt.value = "rivers and houses"  # a word of the class, in the plural
    assert panel.add_button.layout.display == "none"
    panel.controls.prompt.value = "a drawing of {classes}"
    assert panel.add_button.layout.display == "none"
    press(panel, panel.generate_button)
    assert images(panel)[0].caption == "a drawing of sky, water and house"


def test_each_image_says_how_far_it_follows_its_mask(quick_panel, split, monkeypatch):
    panel, mask = quick_panel, row_mask(split, 0)
    wrong = mask.copy()
    wrong[:4] = HOUSE
    panel.gallery.segmenter = build_segmenter(9, 8)
    monkeypatch.setattr("segcn.models.segmenter.predict", lambda *_: torch.from_numpy(wrong)[None])
    press(panel, panel.generate_button)
    (card,) = panel.gallery.cards
    expected = float(iou(confusion_matrix(torch.from_numpy(wrong), torch.from_numpy(mask), 9)).nanmean())
    assert card.agreement.value == f"follows its mask: mIoU {expected:.2f}" and (card.found[1] == (wrong != mask)).all()
    panel.gallery.view.value = "disagreement"
    shown = np.asarray(Image.open(io.BytesIO(card.image.value)))
    assert ((shown == gallery.WRONG).all(2) == (wrong != mask)).all()


def test_a_photo_lies_under_the_mask_and_becomes_one(quick_panel, split, monkeypatch, tmp_path):
    panel, found = quick_panel, row_mask(split, 3)
    press(panel, panel.mask_button)
    assert panel.status.value == "Error: there is no photo yet: choose one by Photo"
    Image.fromarray(np.zeros((100, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    assert panel.mask_button.layout.display == "none"
    upload(panel.picker.photo, "photo.png", (tmp_path / "photo.png").read_bytes())
    assert not panel.mask_button.layout.display
    assert panel.canvas.under.shape == (64, 64, 3) and bytes(panel.canvas.photo)[1:4] == b"PNG"
    panel.gallery.segmenter = build_segmenter(9, 8)
    monkeypatch.setattr("segcn.models.segmenter.predict", lambda *_: torch.from_numpy(found)[None])
    press(panel, panel.mask_button)
    assert (panel.canvas.mask == found).all()
    panel.picker.size.value = 32
    panel.picker.blank.click()
    assert panel.canvas.under is None and not panel.canvas.photo  # it was of another size


def test_mask_and_image_are_handed_out_as_files_that_can_be_read_again(quick_panel, split, tmp_path, monkeypatch):
    files = {}
    monkeypatch.setattr(
        quick_panel.canvas, "send", lambda content, buffers: files.update({content["name"]: buffers[0]})
    )
    quick_panel.canvas.download_mask()
    press(quick_panel, quick_panel.generate_button)
    quick_panel.gallery.cards[0].download_button.click()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert (read_mask(tmp_path / "mask.png", split.palette) == row_mask(split, 0)).all()
    assert read_settings(tmp_path / "image.png")["prompt"] == [split[0].caption]


def test_the_panel_is_there_before_the_model_and_says_what_fails(split, tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr(widgets, "SETTLING", 0)
    words = "import sys, segcn.notebook.app; sys.exit(len({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
    come, panel = threading.Event(), widgets.Panel(None, split, tmp_path / "saved", SETTINGS)
    panel.load(lambda: (come.wait(60), (pipeline, None))[1])
    panel.generate_button.click()
    await_status(panel, "Loading the model ...")
    come.set()
    wait(panel)
    assert panel.status.value.startswith("Generated 1 of 1") and not panel.save_dir.exists()
    panel = widgets.Panel(None, split, tmp_path / "saved", SETTINGS)
    panel.load(lambda: 1 / 0)
    panel.loader.join()
    press(panel, panel.generate_button)
    assert panel.status.value == "Error: division by zero"


@pytest.mark.slow
def test_on_the_embedded_base_an_image_is_there_within_three_seconds(split, tmp_path):
    settings = make(SampleConfig, "tiny", resolution=128, controlnet_model_name_or_path=str(BASE / "controlnet"))
    panel = widgets.Panel(load_pipeline(settings, split.palette), split, tmp_path, settings)
    assert min(timeit.repeat(lambda: press(panel, panel.generate_button), repeat=3, number=1)) < 3 * SLACK
    assert images(panel)[0].image.shape == (128, 128, 3)
