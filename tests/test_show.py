"""Promise: figures of the notebooks show what they say; captions are varied; a sweep has every pair of settings."""

import json
import shlex
import shutil

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from segcn.data import captions, visualize
from segcn.data.dataset import PairedDataset
from segcn.data.masks import colorize
from segcn.data.metadata import read_split, write_metadata
from segcn.data.palette import Label, Palette
from segcn.data.sampler import class_pixels, frequencies, repeat_factors
from segcn.data.transforms import AUGMENTS
from segcn.data.visualize import write_sheet
from segcn.notebook import plots
from segcn.train.config import TrainConfig
from segcn.utils.args import make, parse
from segcn.utils.errors import UserError

SKY, GRASS = Label(0, "sky", (0, 0, 255)), Label(1, "grass", (0, 255, 0))
PALETTE = Palette((SKY, GRASS, Label(9, "void", (9, 9, 9), ignore=True)))


@pytest.fixture(scope="module")
def train(landscapes):
    visualize.quiet()
    return read_split(landscapes, "train")


@pytest.fixture(scope="module")
def test(landscapes):
    return read_split(landscapes, "test")


@pytest.fixture(scope="module")
def pairs(train):
    return PairedDataset(train, 64, AUGMENTS["affine"], seed=0)


def pixels(figure):
    """The figure as drawn, uint8 [H, W, 3]: drawing it is part of the proof."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def shows_something(figure):
    return len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 10


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def test_a_grid_places_every_image_and_text_and_no_two_overlap():
    red, blue = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((8, 8, 3), (0, 0, 255), np.uint8)
    figure = visualize.grid([[red, blue], [blue, None]], ["one", "two"], ["first", "second"], [["a", "b"], ["c", ""]])
    drawn = pixels(figure)
    assert len(figure.axes) == 3 and {*texts_of(figure)} >= {"one", "two", "first", "second", "a", "b", "c"}
    assert (drawn == (255, 0, 0)).all(-1).sum() * 2 == pytest.approx((drawn == (0, 0, 255)).all(-1).sum(), rel=0.05)
    wide = np.zeros((10, 30, 3), np.uint8)
    figure = visualize.grid([[wide] * 3] * 2, ["a", "b", "c"], ["x", "y"], [["word $5 or $x_{$ " * 9] * 3] * 2)
    boxes = [axes.get_position() for axes in figure.axes]
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    assert all(box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1 for box in boxes)
    assert shows_something(figure)  # dollars are text


def test_overlays_outlines_checkerboards_and_hatching_change_only_their_pixels():
    image, mask = np.full((2, 2, 3), 100, np.uint8), np.array([[0, 1], [255, 255]], np.uint8)
    mixed = visualize.overlay(image, mask, PALETTE)
    assert mixed[0].tolist() == [[50, 50, 178], [50, 178, 50]] and (mixed[1] == 100).all()
    halves = np.repeat([[0, 0, 1, 1]], 4, axis=0).astype(np.uint8)
    drawn = visualize.outlined(np.zeros((4, 4, 3), np.uint8), halves, (1, 2, 3))
    assert (drawn[:, 2] == (1, 2, 3)).all() and drawn[:, [0, 1, 3]].sum() == 0
    board = visualize.checkerboard(np.zeros((16, 16, 3), np.uint8), np.ones((16, 16, 3), np.uint8), squares=4)
    assert board.mean() == 0.5 and board[0, 0, 0] == 0 and board[0, 4, 0] == 1 and board[4, 4, 0] == 0
    valid = np.eye(8, dtype=bool)
    drawn = visualize.hatched(np.full((8, 8, 3), 7, np.uint8), valid)
    assert (drawn[valid] == 7).all() and (drawn[~valid] >= 150).all()


def test_figures_of_a_data_set_show_it_and_shares_leave_out_the_unlabelled(train, test, pairs):
    sheet = visualize.contact_sheet(train, 3)
    assert [text.replace("\n", " ") for text in texts_of(sheet)] == [record.caption for record in train.records[:3]]
    shares, counted = visualize.class_shares(train), visualize.augmented_pixels(pairs)
    assert shares.shape == counted.shape == (12, train.palette.num_classes)
    assert shares.sum(1) == pytest.approx(1) and (counted.sum(1) <= 64 * 64).all()
    measured = {"before": frequencies(class_pixels(train)), "augmented": frequencies(counted)}
    for figure in (
        sheet, visualize.legend(PALETTE), visualize.compare(test, test, 3),
        visualize.class_bars(train.palette, {"before": shares, "after": shares}),
        visualize.class_frequencies(train.palette, measured), visualize.area_per_class(train.palette, shares),
        visualize.word_bars([record.caption for record in train.records]),
    ):  # fmt: skip
        assert shows_something(figure)


def test_figures_of_augmentation_show_it_and_image_and_mask_are_where_the_draw_says(pairs):
    sample = plots.least_in_frame(pairs, 0, epochs=4)
    assert sample.valid.sum() == min(pairs.sample(0, epoch).valid.sum() for epoch in range(4))
    for figure in (
        plots.augmented(pairs, 0, draws=4), plots.network_view(sample, 8), plots.landings(pairs, 1, sample.draw),
        plots.covered(pairs, 1, draws=2), plots.fits(pairs, 0), plots.mirrored_caption(pairs, 0),
    ):  # fmt: skip
        assert shows_something(figure)
    for epoch in range(5):
        image, mask = plots.misplaced(pairs.draw(0, epoch), (96, 120), 120)
        assert image < 1.2 and mask <= 1.5


def test_curves_start_unbiased_and_nothing_measured_is_said():
    assert plots.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots.smooth([5.0, 0.0])[0] == pytest.approx(5.0)
    line = plots.loss_curve([{"step": step, "loss": 1 / step} for step in range(1, 9)]).axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(1, 9)) and plots.loss_curve([]).axes[0].texts
    for figure in (plots.faithfulness_curve([]), plots.class_faithfulness([], PALETTE)):
        assert "not measured" in figure.axes[0].texts[0].get_text()


def test_the_curve_of_faithfulness_marks_where_it_begins_and_is_best(tmp_path):
    shares = {0: 0.2, 50: 0.3, 100: 0.8, 150: 0.7}
    entries = [{"step": 0, "ceiling": {"miou": 0.5, "images": 4, "per_class": {"sky": 0.9, "grass": 0.1}}}]
    for step, share in shares.items():
        per_class = {"sky": share, "grass": None}
        entries.append({"step": step, "faithfulness": {"miou": share / 2, "of_ceiling": share, "per_class": per_class}})
        entries.append({"step": step + 10, "loss": 0.3})
    axes = plots.faithfulness_curve(entries).axes[0]
    words = " ".join(texts_of(axes))
    assert "best: 80%" in words and "begins to obey\nat step 100" in words
    assert [dict(zip(*line.get_data(), strict=True)) for line in axes.lines][1] == shares
    bars = plots.class_faithfulness(entries, PALETTE).axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["sky"]
    assert "at step 100" in f"{bars.get_title()}{bars.get_title('left')}"
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    before = plots.progress(tmp_path)
    write_sheet(tmp_path / "validation" / "step-000100.png", np.zeros((2, 3, 32, 32, 3), np.uint8))
    after = plots.progress(tmp_path)
    assert (len(before.axes), len(after.axes)) == (2, 3)
    assert all(shows_something(figure) for figure in (axes.figure, bars.figure, before, after))


def test_a_class_is_made_rare_where_none_is_and_what_is_rare_stays(train):
    shows = class_pixels(train) > 0
    rarest = int(np.where(shows.any(0), shows.sum(0), len(train) + 1).argmin())
    thinned = plots.with_a_rare_class(train, kept=4)
    kept = (class_pixels(thinned) > 0)[:, rarest].sum()
    assert kept == -(-shows[:, rarest].sum() // 4) and len(thinned) == len(train) - shows[:, rarest].sum() + kept
    assert plots.with_a_rare_class(train, share=1.0) is train
    repeats = repeat_factors(class_pixels(thinned), 0.8)
    assert frequencies(class_pixels(thinned), repeats)[0][rarest] > frequencies(class_pixels(thinned))[0][rarest]


def test_only_some_step_lines_are_printed(capsys):
    shown = ["step 50/100  loss 0.4", "segmenter: step 100/100, loss 1", "Saved x."]
    for line in ("step 10/100  loss 0.5", *shown, "", " 3%|#"):
        plots.print_seldom(line)
    assert capsys.readouterr().out.splitlines() == shown


def test_the_shown_command_gives_the_same_config():
    config = make(TrainConfig, "tiny", dataset_name="my data", max_train_steps=7, validation_prompt=["a b", "c"])
    words = shlex.split(plots.command_text(config).replace("\\\n", " "))
    start = words.index("segcn.train") + 1
    assert parse(TrainConfig, words[start:], "train") == config and len(words) - start < 12


def test_validation_over_time_takes_first_and_last(tmp_path):
    for step in range(10, 101, 10):
        lines = np.full((2, 2, 32, 32, 3), step, np.uint8)
        write_sheet(tmp_path / "validation" / f"step-{step:06d}.png", lines)
    figure = plots.validation_over_time(tmp_path, most=3)
    words = texts_of(figure)
    assert words[0] == "mask" and words[1] == "step 10" and words[-1] == "step 100" and len(figure.axes) == 8


def test_captions_are_varied_and_get_a_side():
    old = "an autumn landscape at dusk with a lake"
    assert captions.substituted(old) == "a spring landscape at dawn with a lake"
    assert captions.substituted("a winter landscape by day", 3) == "an autumn landscape at dawn"
    assert captions.other_captions(["a cat", "a dog", old]) == ["a dog", old, captions.substituted(old)]
    found = captions.variations(old, [])
    assert found[0] == old and len(set(found)) == 4
    assert captions.variations("a cat", ["a dog", "a cat", "a hen"], 3) == ["a cat", "a dog", "a hen"]
    assert captions.common_words(["a red house", "the red car"], 1) == [("red", 2)]
    mask = np.repeat([[0] * 6 + [1] * 2], 8, axis=0).astype(np.uint8)
    assert plots.sided_caption("a lake", mask, PALETTE) == "a lake, more grass on the right"
    assert plots.sided_caption("a lake at the left", mask, PALETTE) == "a lake at the left"


def test_the_story_shows_each_image_in_its_place(test, tmp_path):
    black = np.zeros((2, 64, 64, 3), np.uint8)
    figure = plots.write_story(
        tmp_path / "story.png", test, test, test, black, ["one", "a very long caption " * 20], 64
    )
    mask, real, *_, other = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:5])
    image, ids = visualize.read_pair(test, 0)
    assert (mask == colorize(ids, test.palette)).all() and (real == image).all() and (other == 0).all()
    assert Image.open(tmp_path / "story.png").width >= 1400


def test_a_sweep_has_a_folder_for_each_pair_and_one_figure_shows_them_and_names_the_highest(tmp_path, train):
    points = plots.points("1,2", "0.5,1", tmp_path)
    assert [point.folder.name for point in points] == [
        "guidance-1-mask-0.5", "guidance-1-mask-1", "guidance-2-mask-0.5", "guidance-2-mask-1",
    ]  # fmt: skip
    folder = str(points[2].folder)
    given = {"guidance_scale": 2.0, "controlnet_conditioning_scale": 0.5, "output_dir": folder}
    assert points[2].parameters == given
    for place, point in enumerate(points):  # each shows other rows of the landscapes
        folder = shutil.copytree(train.folder, point.folder / "generated")
        train.palette.save(folder / "palette.json")
        rows = train.records[2 * place : 2 * place + 2]
        write_metadata(folder, [(one.image_name, one.mask_name, one.captions) for one in rows])
    figure = plots.sweep_figure(points, [0.25, 0.5, 0.75, 0.125], row=1)
    for place, axes in enumerate(figure.axes):
        assert np.array_equal(axes.images[0].get_array(), visualize.read_pair(train, 2 * place + 1)[0])
    words = " ".join(texts_of(figure)).replace("\n", " ")
    assert "mIoU 0.750, the highest" in words and words.count("highest") == 1
    assert all(word in words for word in ("guidance 1", "guidance 2", "mask weight 0.5", "mask weight 1", "0.125"))


@pytest.mark.parametrize("text", ["", "1,x", "0", "1,-2"])
def test_a_sweep_over_what_is_no_number_above_0_is_refused_by_name(text, tmp_path):
    with pytest.raises(UserError, match="controlnet_conditioning_scales: expected numbers above 0"):
        plots.points("1", text, tmp_path)
