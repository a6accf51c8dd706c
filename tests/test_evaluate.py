"""Promise: an evaluation gives the right numbers, whoever computes them, and each moves as it should.

Notebook 05 holds mIoU and its interval against what it computes by hand.
"""

import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from test_segmenter import PALETTE, write_rectangles

from segcn import cli
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split, write_metadata
from segcn.data.palette import IGNORE, Label, Palette
from segcn.evaluate.config import EvaluateConfig
from segcn.evaluate.evaluator import DRAWS_FILE, LEAST_CROP, METRICS_FILE, Observer, evaluate, faithfulness
from segcn.evaluate.metrics import VISIBLE
from segcn.evaluate.page import extremes, image_scores, report_html, strip
from segcn.evaluate.report import QUESTIONS, answers, comparison, lookup, metrics_table, number
from segcn.evaluate.run import evaluate_folders
from segcn.models.features import INCEPTION, INCEPTION_WEIGHTS, open_extractor
from segcn.models.segmenter import SegmenterConfig, load_segmenter, train_segmenter
from segcn.utils.errors import UserError
from segcn.utils.io import Process

QUICK = SegmenterConfig(steps=80, batch_size=8, learning_rate=0.015, width=16, resolution=32)
ROWS = 16
HERE = Path()


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data with train/ and test/, and a segmenter that was trained on the former."""
    folder = tmp_path_factory.mktemp("evaluate")
    train = write_rectangles(folder / "data" / "train", 32)
    write_rectangles(folder / "data" / "test", ROWS, seed=7)
    train_segmenter(train, QUICK, folder / "segmenter", len, "cpu")
    return folder


@pytest.fixture(scope="module")
def observer(folder):
    segmenter = load_segmenter(folder / "segmenter", "cpu")
    return Observer(segmenter, open_extractor(segmenter), cache=folder / "cache")


@pytest.fixture(scope="module")
def real(folder):
    return read_split(folder / "data" / "test")


@pytest.fixture(scope="module")
def changed(folder, observer, real):
    """The evaluation of a copy of the real images, each of which went through `change`."""

    def evaluated(name, change, **others):
        copy = write_rectangles(folder / name, ROWS, seed=7)
        for record in copy.records:
            change(Image.open(record.image)).save(record.image)
        return evaluate(real, read_split(folder / name), observer, **others, log=len)

    return evaluated


@pytest.fixture(scope="module")
def same(folder, observer, real):
    return evaluate(real, real, observer, reconstructions=real, log=len).metrics


@pytest.fixture(scope="module")
def blurred(folder, changed, real):
    noise = write_rectangles(folder / "noise", 8, seed=7)
    for record in noise.records:
        Image.effect_noise((32, 32), 60).convert("RGB").save(record.image)
    train = read_split(folder / "data" / "train")
    return changed("blurred", lambda image: image.filter(ImageFilter.GaussianBlur(2)), floor=noise, train=train)


def swapped(image):
    """Grass in the color of roads, and roads in that of grass."""
    pixels = np.array(image).astype(int)
    grass, road = (np.array(label.color) for label in PALETTE.labels[1:])
    is_grass, is_road = (abs(pixels - color).sum(-1, keepdims=True) < 60 for color in (grass, road))
    pixels += (road - grass) * is_grass + (grass - road) * is_road
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def moved(image, pixels=2):
    return Image.fromarray(np.roll(np.array(image), pixels, (0, 1)))


def text_of(page):
    """A page without what is in its images, in one line."""
    return " ".join(re.sub(r'base64,[^"]*', "", page).split())


def at(metrics, *place):
    return lookup(metrics, place), lookup(metrics["intervals"], place)


def test_an_identical_set_reaches_its_ceiling_and_is_at_no_distance_and_images_of_any_size_are_seen(
    same, tmp_path, observer
):
    assert same["of_ceiling"] == 1 and same["intervals"]["of_ceiling"] == [1, 1]
    assert same["distance"]["frechet_distance"] == pytest.approx(0, abs=1e-9)
    low, high = same["intervals"]["distance"]["kernel_distance"]
    assert low <= 0 <= high
    assert same["color"]["delta_e"] == 0 and same["color"]["same_masks"]
    assert min(same["distance"][key] for key in ("precision", "recall", "coverage")) == 1
    assert same["faithfulness"]["real"]["miou"] > 0.9
    assert faithfulness(write_rectangles(tmp_path, 6, seed=7, side=100), observer.segmenter)["miou"] > 0.8


def test_blur_moves_the_distances_up_and_faithfulness_down_but_no_color(same, blurred):
    assert max(blurred.metrics["shares_of_ceiling"]["synthetic"].values()) < 0.99
    assert blurred.metrics["distance"]["frechet_distance"] > 0.01
    assert blurred.metrics["intervals"]["distance"]["kernel_distance"][0] > 0
    assert blurred.metrics["distance"]["coverage"] < same["distance"]["coverage"]
    assert blurred.metrics["color"]["delta_e"] < 2


def test_brightness_moves_the_color_and_a_shift_areas_and_more_so_outlines_but_hardly_the_distances(blurred, changed):
    brighter = changed("brighter", lambda image: image.point(lambda value: min(255, value + 30))).metrics
    value, (low, high) = at(brighter, "color", "L")
    assert 5 < low <= value <= high < 20 and brighter["color"]["same_masks"]
    shifted = changed("shifted", moved).metrics
    shares = shifted["shares_of_ceiling"]["synthetic"]
    assert shares["boundary_f"] < shares["miou"] - 0.1 < 0.85
    assert shifted["distance"]["frechet_distance"] < blurred.metrics["distance"]["frechet_distance"] / 2
    assert shifted["color"]["delta_e"] < 2


def test_swapped_classes_lose_their_iou_are_confused_and_look_wrong_and_the_third_class_does_not(changed, same):
    found = changed("swapped", swapped).metrics
    iou, ceiling = (one["faithfulness"]["synthetic"]["per_class"] for one in (found, same))
    assert iou["sky"] > ceiling["sky"] - 0.1
    assert max(iou["grass"], iou["road"]) < 0.1 < ceiling["grass"] and found["of_ceiling"] < 0.5
    confused = np.array(found["confusion"]["synthetic"])
    assert confused[1, 2] > 10 * confused[1, 1] and confused[2, 1] > 10 * confused[2, 2]
    crops = found["intervals"]["crops"]["kernel_distance"]
    assert crops["grass"][0] > 0 and crops["road"][0] > 0 > crops["sky"][0]


def test_training_images_are_found_out_as_copies(folder, observer, real):
    train = read_split(folder / "data" / "train")
    found = evaluate(real, train, observer, train=train, log=len).metrics
    assert found["intervals"]["copies"]["nearer_than_real"][0] > 0.9
    assert all(one["row"] == one["training_row"] and one["distance"] < 1e-5 for one in found["copies"]["closest"])
    assert not found["color"]["same_masks"]
    assert "look at the closest pairs" in dict(answers(found))["Are they copies of training images?"]


def test_images_made_from_real_ones_are_said_to_be_near_by_design(folder, observer, real):
    train = read_split(folder / "data" / "train")
    made = read_split(shutil.copytree(train.folder, folder / "from_images"))
    (made.folder / "generation.json").write_text('{"from_images": 0.6, "inpaint": []}')
    found = evaluate(real, made, observer, train=train, log=len).metrics
    assert "near by design" in dict(answers(found))["Are they copies of training images?"]
    assert "near by design" in metrics_table(found).replace("\n", " ")


def test_the_floor_lies_below_the_ceiling_and_every_interval_holds_its_value(blurred):
    metrics = blurred.metrics
    found = {name: entry["miou"] for name, entry in metrics["faithfulness"].items()}
    assert found["floor"] < found["synthetic"] < found["real"]
    for place in (
        ("faithfulness", "synthetic", "miou"), ("shares_of_ceiling", "floor", "miou"),
        ("faithfulness", "real", "boundary_f"), ("faithfulness", "synthetic", "per_class", "road"),
        ("distance", "frechet_distance"), ("distance", "kernel_distance"), ("copies", "nearer_than_real"),
        ("crops", "kernel_distance", "grass"), ("reliability", "synthetic", "expected_calibration_error"),
    ):  # fmt: skip
        value, (low, high) = at(metrics, *place)
        assert low <= value <= high and low < high, place


def test_no_number_depends_on_batch_size_threads_or_processes(folder, observer, real, blurred):
    other = read_split(folder / "blurred")
    plain = Observer(observer.segmenter, observer.extractor)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        batches = [evaluate(real, other, Observer(plain.segmenter, plain.extractor, batch_size=size), log=len).metrics
                   for size in (1, 5)]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    parts = [Observer(plain.segmenter, plain.extractor, (), folder / "shared", 3, Process(rank, 2)) for rank in (0, 1)]
    seen = [part.observe(other, log=len)["pixels"] for part in parts]
    assert [len(one) for one in seen] == [9, 7]
    shared = Observer(plain.segmenter, plain.extractor, (), folder / "shared", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "look", lambda *_: pytest.fail("looked twice"))
        shared.observe(other, log=len)
    metrics = [evaluate(real, other, one, log=len).metrics for one in (plain, shared)]
    assert batches[0] == batches[1] == metrics[0] == metrics[1]


def test_a_changed_image_is_looked_at_again(tmp_path, observer):
    split = write_rectangles(tmp_path / "data", 4)
    kept = Observer(observer.segmenter, observer.extractor, cache=tmp_path / "cache")
    first = kept.observe(split, log=len)["pixels"]
    Image.open(split[1].image).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(split[1].image)
    again = kept.observe(split, log=len)["pixels"]
    assert not torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
    for path in (tmp_path / "cache" / "seen").iterdir():
        path.write_bytes(b"torn")
    assert torch.equal(kept.observe(split, log=len)["pixels"], again)


COMMAND = ["-m", "segcn.cli", "evaluate"]


@pytest.fixture
def words(folder, tmp_path, blurred):
    """A function from the name of an output to the flags of an evaluation of `blurred`."""
    paths = {"real": "data", "synthetic": "blurred", "segmenter": "segmenter"}
    given = [f"--{name}={folder / path}" for name, path in paths.items()]
    return lambda output: [*given, f"--output_dir={tmp_path / output}", "--batch_size=3"]


def assert_same_files(one, other):
    for name in (METRICS_FILE, DRAWS_FILE, "report.html"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def evaluate_quietly(words, last=0):
    """`segcn evaluate`; with `last`: die of SIGKILL before the `last`-th file gets its name."""
    replace, renamed = os.replace, itertools.count(1)

    def replace_or_die(*paths):
        if next(renamed) == last:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # some kernels come back from the call before the process ends
        replace(*paths)

    os.replace = replace_or_die
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(os.devnull, "w") as sys.stdout:
        cli.run_command(["evaluate", *words])


def test_an_evaluation_that_was_killed_and_restarted_writes_the_bytes_of_one_that_was_not(tmp_path, words, warm):
    def ended(output, last=0):
        process = warm.Process(target=evaluate_quietly, args=(words(output), last))
        process.start()
        process.join()
        return process.exitcode

    assert ended("killed", 4) == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "cache" / "seen").glob("*.safetensors")}
    assert kept and not (tmp_path / "killed" / METRICS_FILE).exists()
    assert ended("killed") == ended("whole") == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_of_torchrun_write_the_bytes_of_one(tmp_path, words):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for output, python in {"one": [], "two": ["-m", "torch.distributed.run", "--nproc_per_node=2"]}.items():
        command = [sys.executable, *python, *COMMAND, *words(output)]
        assert subprocess.run(command, env=environment).returncode == 0
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_metrics_of_your_own_are_reported_with_their_intervals(blurred, real, tmp_path):
    def accuracy(predicted, mask):
        return (predicted == mask)[mask != IGNORE].mean()

    splits = {name: blurred.splits[name] for name in ("synthetic", "floor")}
    found = evaluate(real, observer=blurred.observer, **splits, log=len, metrics={"<accuracy>": accuracy})
    counts = blurred.seen["synthetic"]["pixels"].double().sum(1)
    value, (low, high) = at(found.metrics, "custom", "synthetic", "<accuracy>")
    assert value == pytest.approx((counts[:, 2] / counts[:, 0]).mean().item()) and low < value < high
    assert f"<accuracy>, with mask: {value:.3f} [{low:.3f}, {high:.3f}]" in metrics_table(found.metrics)
    page = text_of(report_html(found, HERE))
    assert "&lt;accuracy&gt;" in page and f"[{low:.3f}, {high:.3f}]" in page
    found.write(tmp_path)
    assert "<accuracy>, with mask" in comparison(tmp_path, tmp_path)


def test_table_and_report_name_the_extractor_and_hold_the_numbers_with_their_intervals(blurred):
    metrics, text = blurred.metrics, metrics_table(blurred.metrics)
    for entry in metrics["faithfulness"].values():
        for value in (entry["miou"], *entry["per_class"].values()):
            assert f"{value:.3f}" in text
    low, high = metrics["intervals"]["shares_of_ceiling"]["synthetic"]["miou"]
    assert f"{metrics['of_ceiling']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "Fréchet distance (segmenter features)" in text and "kernel distance (segmenter features)" in text
    assert "FID" not in text and "KID" not in text and "mostly bias" in text
    assert all(name in text for name in ("real (ceiling)", "with mask", "no mask (floor)", *PALETTE.names))
    page = text_of(report_html(blurred, HERE))
    assert page.count("data:image/png;") == 9
    for words in ("real (ceiling)", "no mask (floor)", "mostly bias", "closest pairs", "expected calibration error",
                  "A class that no mask holds is left out of the mean"):  # fmt: skip
        assert words in page
    crowded = json.loads(json.dumps(metrics))
    for entry in crowded["faithfulness"].values():
        entry["per_class"] = {f"a class of things {k}": k / 150 for k in range(150)}
    text = metrics_table(crowded)
    assert max(map(len, text.splitlines())) <= 100 and f"{149 / 150:.3f}" in text  # narrow with many classes


def test_the_report_opens_with_images_then_answers_then_tables_and_names_folders_from_where_it_lies(blurred, folder):
    page = text_of(report_html(blurred, folder / "reports"))
    order = [page.index(words) for words in ("the best, the median and the worst", "<dl>", "</dl>", "<table>")]
    assert order == sorted(order) and page.count("<dt>") == page.count("<dd>") == 6
    assert "<td>../blurred</td>" in page and f">{folder}" not in page
    assert f"{VISIBLE} is just visible" in page and page.count("<img") == len(
        re.findall(r'<img[^>]* alt="[^"]+"', page)
    )
    pair = faithfulness(blurred.splits["synthetic"].first(1), blurred.observer.segmenter)["miou"]
    assert image_scores(blurred)[0] == pytest.approx(pair) and len(image_scores(blurred)) == ROWS


def test_distances_by_other_extractors_stand_beside_their_names_in_every_report(observer, real, folder, tmp_path):
    split, own = write_rectangles(folder / "others", ROWS, seed=8), observer.extractor
    others = (own._replace(name="dinov2"), own._replace(name="CLIP (vit)", of_clip=True))
    found = evaluate(real, split, Observer(observer.segmenter, own, others=others), log=len)
    distance, by_others = found.metrics["distance"], found.metrics["distances"]
    assert by_others["dinov2"]["FD"] == distance["frechet_distance"] and list(by_others["CLIP (vit)"]) == ["CMMD"]
    assert by_others["dinov2"]["coverage"] == distance["coverage"]
    found.write(tmp_path)
    page, low = text_of(report_html(found, tmp_path)), found.metrics["intervals"]["distances"]["CLIP (vit)"]["CMMD"][0]
    assert "dinov2: FD " in metrics_table(found.metrics) and "KD (dinov2)" in page and "CMMD (CLIP (vit))" in page
    assert number(low, 3) in metrics_table(found.metrics) and "CMMD (CLIP (vit))" in comparison(tmp_path, tmp_path)


def test_the_report_is_one_file_that_escapes_names_and_names_its_extractor(folder, observer, real, tmp_path):
    split = write_rectangles(tmp_path / "<script>alert(1)</script>" / "set", 8, seed=7)
    palette = Palette((*PALETTE.labels[:2], Label(2, "<b>road & way</b>", PALETTE.labels[2].color)))
    rows = [(record.image_name, record.mask_name, "<img src=x onerror=alert(2)>") for record in split.records]
    for one in (split.folder, tmp_path / "real"):
        write_rectangles(one, 8, seed=7)
        palette.save(one / "palette.json")
        write_metadata(one, rows)
    found = evaluate(read_split(tmp_path / "real"), read_split(split.folder), observer, log=len)
    page = text_of(report_html(found, tmp_path))
    assert "<script" not in page and "<img src=x" not in page and "<b>road" not in page
    assert "&lt;script&gt;" in page and "segmenter features" in page and "FID" not in page
    assert page.count("data:image/png;") == 6 and "http" not in page
    assert "Not measured: the real data set has no train split" in page


def test_the_best_and_worst_images_of_a_class_are_those_with_the_best_and_worst_iou(blurred):
    wanted, found, both = blurred.seen["synthetic"]["pixels"][:, 2].double().unbind(1)
    chosen = extremes(blurred, 2)
    large = wanted >= min(max(LEAST_CROP, 0.01 * 32 * 32), wanted[wanted > 0].median())
    scores = (both / (wanted + found - both))[large].sort(descending=True).values.tolist()
    assert [value for _, value in chosen] == pytest.approx(scores[:1] + scores[-1:])
    image = strip(blurred, chosen[0][0])
    assert image.shape == (32, 3 * 32 + 2 * 3, 3)
    wanted_mask = read_mask(blurred.splits["synthetic"][chosen[0][0]].mask, PALETTE)
    assert (image[:, 35:67] == PALETTE.table[wanted_mask]).all()


@pytest.fixture(scope="module")
def recaptioned(folder, changed):
    """The evaluation of good images beside bad ones of half of the masks, whose captions name no class, and others."""
    sets, made = {}, {"seed": 0, "without_class_words": False, "mix_prompts": False}
    for name, changes in {"cut": {"without_class_words": True}, "mixed": {"mix_prompts": True, "seed": 1}}.items():
        split = write_rectangles(folder / name, ROWS, seed=7)
        lines = [(row.image_name, row.mask_name, "" + name) for row in split.records[: ROWS // 2]]
        write_metadata(split.folder, lines)
        (split.folder / "generation.json").write_text(json.dumps(made | changes))
        for record in split.records[: ROWS // 2]:
            image = Image.open(record.image)
            (swapped(image) if name == "cut" else moved(image)).save(record.image)
        sets[name] = read_split(split.folder)
    (folder / "as_they_are").mkdir()
    (folder / "as_they_are" / "generation.json").write_text(json.dumps(made | {"controls": "a b", "split": "test"}))
    others = {"without_classes": sets["cut"], "other_captions": sets["mixed"]}
    return changed("as_they_are", lambda image: image.filter(ImageFilter.GaussianBlur(1)), **others)


def test_captions_without_classes_and_of_other_rows_have_rows_of_their_own_in_every_report(recaptioned, tmp_path):
    metrics = recaptioned.metrics
    table, page = metrics_table(metrics), text_of(report_html(recaptioned, HERE))
    for name, title in (("without_classes", "captions without classes"), ("other_captions", "another row's caption")):
        assert metrics["faithfulness"][name]["images"] == ROWS // 2
        for place in (("faithfulness", name, "miou"), ("shares_of_ceiling", name, "miou"),
                      ("shares_of_with_mask", name, "miou"), ("faithfulness", name, "boundary_f")):  # fmt: skip
            value, (low, high) = at(metrics, *place)
            assert low <= value <= high and low < high
            assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in table + page
        assert title in table and title.replace("'", "&#39;") in page
    share = metrics["shares_of_with_mask"]
    assert share["without_classes"]["miou"] < 0.6 < share["other_captions"]["miou"]
    assert "Does a mask suffice without classes in the caption?</dt> <dd>No: mIoU is" in page
    for value, said in ((0.96, "Yes"), (0.86, "Less well"), (0.5, "No")):
        other = metrics | {"shares_of_with_mask": share | {"without_classes": {"miou": value}}}
        assert dict(answers(other))[QUESTIONS["without_classes"]].startswith(f"{said}: mIoU is 0.")
    assert "Is the mask followed under another row&#39;s caption?" in page and not metrics["not_given"]
    recaptioned.write(tmp_path)
    lines = comparison(tmp_path, tmp_path)
    assert "of those with mask, captions without classes" in lines and "mIoU, another row's caption" in lines


def test_images_with_other_captions_are_compared_with_those_of_the_same_masks(recaptioned, observer):
    halved = recaptioned.splits["synthetic"].first(ROWS // 2)
    scores = [
        faithfulness(recaptioned.splits["other_captions"], observer.segmenter),
        faithfulness(halved, observer.segmenter),
    ]
    share = recaptioned.metrics["shares_of_with_mask"]["other_captions"]["miou"]
    assert share == pytest.approx(scores[0]["miou"] / scores[1]["miou"])
    same = evaluate(halved, halved, observer, without_classes=halved, log=len).metrics
    assert at(same, "shares_of_with_mask", "without_classes", "miou") == (1, [1, 1])  # paired image by image


def test_a_set_with_other_captions_that_cannot_be_compared_is_named(recaptioned, real, observer):
    (said,) = (line for line in recaptioned.metrics["warnings"] if "may mislead" in line)
    assert "another row's caption" in said and said.endswith("with mask: seed.")
    cut = recaptioned.splits["without_classes"]
    wrong = {"without_classes": recaptioned.splits["other_captions"], "other_captions": cut}
    found = evaluate(real, recaptioned.splits["synthetic"], observer, **wrong, log=len).metrics["warnings"]
    for flag in ("--without_class_words", "--mix_prompts"):
        assert any(f"was generated without {flag}" in line for line in found)
    found = evaluate(real, real, observer, without_classes=real, log=len).metrics["warnings"]
    assert any("nothing was cut from its captions" in line and '"words"' in line for line in found)


def test_a_report_without_these_sets_says_the_command_that_makes_them(recaptioned, real, observer):
    found = evaluate(real, recaptioned.splits["synthetic"], observer, log=len)
    for text in (metrics_table(found.metrics), html.unescape(text_of(report_html(found, HERE)))):
        text = " ".join(text.split())
        for name, flag in (("without_classes", "--without_class_words"), ("other_captions", "--mix_prompts")):
            assert f"segcn generate --controls 'a b' --split test --limit 48 --output_dir DIR {flag}" in text
            assert f"segcn evaluate --{name} DIR" in text
    assert "Does a mask suffice without classes in the caption?</dt> <dd>Not measured; segcn generate" in text


def test_two_runs_are_compared_with_paired_intervals(observer, real, blurred, tmp_path):
    blurred.write(tmp_path / "blurred")
    assert json.loads((tmp_path / "blurred" / METRICS_FILE).read_text()) == blurred.metrics
    evaluate(real, real, observer, log=len).write(tmp_path / "same")
    table = comparison(tmp_path / "blurred", tmp_path / "same" / METRICS_FILE)
    lines = {line[:44].strip(): line for line in table.splitlines()}
    share = lines["mIoU of ceiling, with mask"]
    assert f"{blurred.metrics['of_ceiling']:.3f}" in share and "1.000" in share and share.endswith("*")
    assert "Fréchet distance (segmenter features)" in lines and lines["IoU of grass, with mask"].endswith("*")
    same = comparison(tmp_path / "same", tmp_path / "same")
    assert "0.000 [0.000, 0.000]" in same and not any(line.endswith("]  *") for line in same.splitlines())
    with pytest.raises(UserError, match=r"expected metrics\.json and draws\.safetensors"):
        comparison(tmp_path / "same", tmp_path / "none")


def test_the_evaluation_of_other_images_is_not_replaced(folder, tmp_path, blurred):
    settings = {"real": str(folder / "data"), "segmenter": str(folder / "segmenter"), "output_dir": str(tmp_path)}
    (tmp_path / METRICS_FILE).write_text('{"sets": {"synthetic": {"folder": "/somewhere/else", "fingerprint": ""}}}')
    with pytest.raises(UserError, match=r"is the evaluation of /somewhere/else, not of .*choose another --output_dir"):
        evaluate_folders(EvaluateConfig(**settings, synthetic=str(folder / "blurred")), log=len)
    with pytest.raises(UserError, match="needs --real DATASET and --synthetic DATASET"):
        evaluate_folders(EvaluateConfig(real="here"), log=len)


def test_a_class_that_no_mask_holds_leaves_the_mean(tmp_path, observer):
    split = write_rectangles(tmp_path, 3)
    for record in split.records:
        mask = read_mask(record.mask, PALETTE)
        write_mask(record.mask, np.where(mask == 2, IGNORE, mask), PALETTE)
    split = read_split(tmp_path)
    evaluated = evaluate(split, split, observer, log=len).metrics["faithfulness"]["real"]
    for found in (faithfulness(split, observer.segmenter), evaluated):
        classes = found["per_class"]
        assert classes["road"] is None and found["miou"] == pytest.approx((classes["sky"] + classes["grass"]) / 2)


def test_a_broken_image_is_named_and_sets_that_do_not_belong_together_are_refused(tmp_path, real, observer):
    split = write_rectangles(tmp_path, 4)
    with pytest.raises(UserError, match="at least 2 images"):
        evaluate(split, replace(split, records=split.records[:1]), observer, log=len)
    split[2].image.write_bytes(b"not an image")
    for look in (lambda: evaluate(real, split, observer, log=len), lambda: faithfulness(split, observer.segmenter)):
        with pytest.raises(UserError, match=r"metadata\.csv, line 4 \(row 2\).*2\.png"):
            look()
    Palette((*PALETTE.labels, Label(3, "house", (1, 2, 3)))).save(tmp_path / "palette.json")
    other = read_split(tmp_path)
    with pytest.raises(UserError, match="its palette differs"):
        evaluate(real, other, observer, log=len)
    with pytest.raises(UserError, match="expected the 3 classes of the segmenter, found 4"):
        evaluate(other, other, observer, log=len)


def test_inception_weights_are_used_when_at_hand_and_missing_or_wrong_ones_are_named(observer, tmp_path):
    with pytest.raises(UserError, match=INCEPTION_WEIGHTS):
        open_extractor(observer.segmenter, tmp_path / "none.pth")
    stored = tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION_WEIGHTS
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"not weights")
    with pytest.raises(UserError, match="expected Inception's weights"):
        open_extractor(observer.segmenter)


@pytest.mark.slow
def test_inceptions_features_are_named_and_those_of_other_weights_are_not_called_fid(observer, real, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        random = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(random.state_dict(), tmp_path / "inception.pth")
    extractor = open_extractor(observer.segmenter, tmp_path / "inception.pth")
    found = evaluate(real, real, Observer(observer.segmenter, extractor), log=len)
    assert found.metrics["distance"]["features"] == 2048 and "below 10240 images" in metrics_table(found.metrics)
    assert "Fréchet distance (Inception v3 with other weights (inception.pth)): " in metrics_table(found.metrics)
    published = observer.extractor._replace(name=INCEPTION)
    found = evaluate(real, real, Observer(observer.segmenter, published), log=len)
    assert "FID (Inception v3, 2015-12-05): " in metrics_table(found.metrics)
    assert "KID (Inception v3, 2015-12-05)" in text_of(report_html(found, HERE))
