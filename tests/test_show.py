import json
import shlex

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from segcn.data import captions, visualize
from segcn.data.dataset import PairedDataset
from segcn.data.masks import colorize
from segcn.data.metadata import read_split
from segcn.data.palette import Label, Palette
from segcn.data.sampler import class_pixels, frequencies
from segcn.data.transforms import AUGMENTS
from segcn.data.visualize import write_sheet
from segcn.notebook import plots
from segcn.train.config import TrainConfig
from segcn.utils.args import make, parse

SKY, GRASS, VOID = (
    Label(0, "sky", (0, 0, 255)),
    Label(1, "grass", (0, 255, 0)),
    Label(9, "void", (9, 9, 9), ignore=True),
)
PALETTE = Palette((SKY, GRASS, VOID))


@pytest.fixture(scope="module")
def train(landscapes):
    visualize.quiet()
    return read_split(landscapes, "train")


@pytest.fixture(scope="module")
def test(landscapes):
    return read_split(landscapes, "test")


def pixels(figure):
    """The figure as drawn, uint8 [H, W, 3]: drawing it is part of the proof."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def shows_something(figure):
    return len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 10


def test_a_grid_places_every_picture_and_text():
    red, blue = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((8, 8, 3), (0, 0, 255), np.uint8)
    figure = visualize.grid([[red, blue], [blue, None]], ["one", "two"], ["first", "second"], [["a", "b"], ["c", ""]])
    drawn = pixels(figure)
    assert len(figure.axes) == 3
    assert {text.get_text() for text in figure.texts} >= {"one", "two", "first", "second", "a", "b", "c"}
    assert (drawn == (255, 0, 0)).all(-1).sum() * 2 == pytest.approx((drawn == (0, 0, 255)).all(-1).sum(), rel=0.05)


def test_no_two_pictures_of_a_grid_overlap():
    image = np.zeros((10, 30, 3), np.uint8)
    figure = visualize.grid([[image] * 3] * 2, ["a", "b", "c"], ["x", "y"], [["word " * 30] * 3] * 2)
    boxes = [axes.get_position() for axes in figure.axes]
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    assert all(box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1 for box in boxes)


def test_captions_with_dollars_are_text():
    visualize.quiet()
    assert shows_something(visualize.grid([[np.zeros((8, 8, 3), np.uint8)]], below=[["costs $5 or $x_{$"]]))


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


def test_pictures_of_a_data_set(train, test):
    for figure in (visualize.contact_sheet(train, 3), visualize.legend(PALETTE), visualize.compare(test, test, 3)):
        assert shows_something(figure)
    assert [text.get_text().replace("\n", " ") for text in visualize.contact_sheet(train, 3).texts] == [
        record.caption for record in train.records[:3]
    ]


def test_pictures_of_augmentation(train):
    pairs = PairedDataset(train, 64, AUGMENTS["affine"], seed=0)
    sample = plots.least_in_frame(pairs, 0, epochs=4)
    assert sample.valid.sum() == min(pairs.sample(0, epoch).valid.sum() for epoch in range(4))
    for figure in (
        plots.augmented(pairs, 0, draws=4), plots.network_view(sample, 8), plots.landings(pairs, 1, sample.draw),
        plots.covered(pairs, 1, draws=2), plots.fits(pairs, 0), plots.mirrored_caption(pairs, 0),
    ):  # fmt: skip
        assert shows_something(figure)


def test_image_and_mask_are_where_the_draw_says(train):
    pairs = PairedDataset(train, 64, AUGMENTS["affine"], seed=0)
    for epoch in range(5):
        image, mask = plots.misplaced(pairs.draw(0, epoch), (96, 120), 120)
        assert image < 1.2 and mask <= 1.5


def test_a_caption_gets_a_side():
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 6:] = 1
    name = PALETTE.names[1]
    assert plots.sided_caption("a lake", mask, PALETTE) == f"a lake, more {name} on the right"
    assert plots.sided_caption("a lake at the left", mask, PALETTE) == "a lake at the left"


def test_shares_add_up_and_leave_out_the_unlabelled(train):
    shares = visualize.class_shares(train)
    assert shares.shape == (12, train.palette.num_classes) and shares.sum(1) == pytest.approx(1)
    pixels = visualize.augmented_pixels(PairedDataset(train, 64, AUGMENTS["affine"], seed=0))
    assert pixels.shape == (12, train.palette.num_classes) and (pixels.sum(1) <= 64 * 64).all()
    measured = {"before": frequencies(class_pixels(train)), "augmented": frequencies(pixels)}
    for figure in (
        visualize.class_bars(train.palette, {"before": shares, "after": shares}),
        visualize.class_frequencies(train.palette, measured),
        visualize.area_per_class(train.palette, shares),
        visualize.word_bars([record.caption for record in train.records]),
    ):
        assert shows_something(figure)


def test_smoothing_starts_unbiased_and_keeps_a_constant():
    assert plots.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots.smooth([5.0, 0.0])[0] == pytest.approx(5.0)


def test_the_loss_curve_of_nothing_and_of_something():
    assert plots.loss_curve([]).axes[0].texts
    entries = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    line = plots.loss_curve(entries).axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(1, 9))


def test_the_curve_of_faithfulness_marks_where_it_begins_and_is_best(tmp_path):
    shares = {0: 0.2, 50: 0.3, 100: 0.8, 150: 0.7}
    entries = [{"step": 0, "ceiling": {"miou": 0.5, "images": 4, "per_class": {"sky": 0.9, "grass": 0.1}}}]
    for step, share in shares.items():
        per_class = {"sky": share, "grass": None}
        entries.append({"step": step, "faithfulness": {"miou": share / 2, "of_ceiling": share, "per_class": per_class}})
        entries.append({"step": step + 10, "loss": 0.3})
    axes = plots.faithfulness_curve(entries).axes[0]
    words = " ".join(text.get_text() for text in axes.texts)
    assert "best: 80%" in words and "begins to obey\nat step 100" in words
    assert [dict(zip(*line.get_data(), strict=True)) for line in axes.lines][1] == shares
    bars = plots.class_faithfulness(entries, PALETTE).axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["sky"]
    assert "at step 100" in f"{bars.get_title()}{bars.get_title('left')}"
    assert all(shows_something(figure) for figure in (axes.figure, bars.figure))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert len(plots.progress(tmp_path).axes) == 2 and shows_something(plots.progress(tmp_path))
    write_sheet(tmp_path / "validation" / "step-000100.png", np.zeros((2, 3, 32, 32, 3), np.uint8))
    assert len(plots.progress(tmp_path).axes) == 3 and shows_something(plots.progress(tmp_path))


def test_nothing_measured_is_said():
    for figure in (plots.faithfulness_curve([]), plots.class_faithfulness([], PALETTE)):
        assert "not measured" in figure.axes[0].texts[0].get_text()


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
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "mask" and words[1] == "step 10" and words[-1] == "step 100" and len(figure.axes) == 8


def test_captions_are_retold():
    old = "an autumn landscape at dusk with a lake"
    assert captions.substituted(old) == "a spring landscape at dawn with a lake"
    assert captions.substituted("a winter landscape by day", 3) == "an autumn landscape at dawn"
    assert captions.other_captions(["a cat", "a dog", old]) == ["a dog", old, captions.substituted(old)]
    told = captions.variations(old, [])
    assert told[0] == old and len(set(told)) == 4
    assert captions.variations("a cat", ["a dog", "a cat", "a hen"], 3) == ["a cat", "a dog", "a hen"]
    assert captions.common_words(["a red house", "the red car"], 1) == [("red", 2)]


def test_the_story_shows_each_picture_in_its_place(test, tmp_path):
    black = np.zeros((2, 64, 64, 3), np.uint8)
    figure = plots.write_story(tmp_path / "story.png", test, test, test, black, ["one", "a very long caption " * 20])
    mask, real, *_, other = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:5])
    image, ids = visualize.read_pair(test, 0)
    assert (mask == colorize(ids, test.palette)).all() and (real == image).all() and (other == 0).all()
    assert Image.open(tmp_path / "story.png").width >= 1400
