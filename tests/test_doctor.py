"""Promise: every fault of a data set is found with its row and file, whatever else is wrong with it."""

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from malformed import exif_of
from PIL import Image

from segcn import cli
from segcn.data.config import DoctorConfig
from segcn.data.doctor import report
from segcn.data.doctor.findings import FAULTS, NEAR, Finding, examine, nearest_hashes
from segcn.data.doctor.report import as_json, doctor_page, find_report, quarantine, summary_lines, validate
from segcn.data.doctor.scan import ImageFacts, MaskFacts, dhash, image_facts, mask_facts
from segcn.data.masks import write_mask
from segcn.data.metadata import check_split, read_split, write_metadata
from segcn.data.palette import Label, Palette
from segcn.train.config import TrainConfig
from segcn.train.setup import check_rows
from segcn.utils.errors import UserError

PALETTE = Palette((Label(0, "sky", (135, 206, 235)), Label(1, "tree", (0, 100, 0))))
SIZE = (40, 32)  # (height, width)


def photo(seed, size=SIZE):
    """Blocks of random grey, unlike for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size[0] // 4, size[1] // 4, 1), np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1).repeat(3, 2))


def make_split(folder, rows, first=0, palette=None):
    """Pairs of 32 x 40 pixels that show both classes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    mask = np.indices(SIZE).sum(0).astype(np.uint8) // 36
    for row in range(rows):
        photo(first + row).save(folder / f"images/{row}.png")
        write_mask(folder / f"masks/{row}.png", mask, PALETTE)
    write_metadata(folder, [(f"images/{k}.png", f"masks/{k}.png", f"a tree, number {k}") for k in range(rows)])
    if palette:
        palette.save(folder / "palette.json")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_split(tmp_path / "pair", 4, palette=PALETTE)


@pytest.fixture
def splits(tmp_path):
    make_split(tmp_path / "pairs/train", 4), make_split(tmp_path / "pairs/test", 3, first=100)
    PALETTE.save(tmp_path / "pairs/palette.json")
    return tmp_path / "pairs"


def check(folder, **settings):
    return examine(DoctorConfig(dataset_name=str(folder), **settings), log=lambda line: None)


def set_caption(folder, row, caption):
    rows = list(csv.reader((folder / "metadata.csv").open()))
    rows[row + 1][2] = caption
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_a_clean_set_has_no_finding_and_the_summary_of_every_kind_fits_twenty_lines(folder, splits, tmp_path):
    assert check(splits).findings == ()
    checkup = check(folder)
    assert checkup.findings == () and checkup.files == 8
    assert [entry["masks"] for entry in checkup.classes["train"]] == [4, 4, 0]
    assert sum(entry["pixels"] for entry in checkup.classes["train"]) == 4 * SIZE[0] * SIZE[1]
    assert checkup.captions["train"]["different"] == 4 and as_json(checkup, DoctorConfig())["errors"] == 0
    every = tuple(Finding(kind, "x", "train", 0, 2, "a.png") for kind in FAULTS)
    lines = summary_lines(replace(checkup, findings=every))
    assert len(lines) <= 20 and "training would fail" in lines[-1]
    with pytest.raises(UserError, match="no tokenizer in"):
        check(folder, pretrained_model_name_or_path=str(tmp_path))


def test_every_fault_of_a_file_is_found_whatever_else_is_wrong(tmp_path):
    folder = make_split(tmp_path / "pairs", 10, palette=PALETTE)
    images, masks = ([folder / f"{kind}/{row}.png" for row in range(10)] for kind in ("images", "masks"))
    images[0].unlink()
    photo(1).save(images[1], format="BMP")
    images[1].write_bytes(images[1].read_bytes()[:-50])
    masks[2].write_bytes(b"nothing")
    photo(3, (400, 320)).save(images[3])  # above the limit
    write_mask(masks[4], np.zeros((8, 8), np.uint8), PALETTE)
    for row, orientation in ((5, 6), (6, 3)):  # 6: upright it is 40 x 32, its mask is not turned
        photo(row).save(images[row], exif=exif_of(orientation))
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(masks[7], format="JPEG")
    mask = np.zeros(SIZE, np.uint8)
    mask[:2, :5], mask[4] = 9, 200
    Image.fromarray(mask).save(masks[8])
    rows = (folder / "metadata.csv").read_text().replace("images/9.png", "x" * 300)  # no file can have this name
    (folder / "metadata.csv").write_text(rows)
    findings = check(folder, max_pixels=10_000).findings
    assert [(item.kind, item.row, item.file) for item in findings] == [
        ("missing", 0, "images/0.png"), ("missing", 9, "x" * 300), ("truncated", 1, "images/1.png"),
        ("undecodable", 2, "masks/2.png"), ("too_large", 3, "images/3.png"), ("size", 4, "masks/4.png"),
        ("rotation", 5, "masks/5.png"), ("lossy_mask", 7, "masks/7.png"), ("labels", 8, "masks/8.png"),
        ("exif", 5, "images/5.png"), ("exif", 6, "images/6.png"),
    ]  # fmt: skip
    assert "value 200 (32 pixels), value 9 (10 pixels)" in findings[8].message


def test_captions_that_are_empty_or_no_words_or_too_long(folder):
    set_caption(folder, 0, "  ")
    set_caption(folder, 1, "2024")
    set_caption(folder, 2, "a hill " * 40 + "and the END")
    findings = check(folder).findings
    assert [(item.kind, item.row) for item in findings] == [("caption", 0), ("caption_words", 1), ("caption_long", 2)]
    assert findings[2].message.endswith("and the end'") and "of 48 tokens" in findings[2].message


def test_lines_that_cannot_be_read_are_collected(folder):
    with (folder / "metadata.csv").open("ab") as file:
        file.write(b"images/0.png,masks/0.png,a,b\nimages/0.png,masks/0.png,caf\xe9\n../x.png,masks/0.png,a tree\n")
        file.write(b'images/0.png,masks/0.png,"an open quote\n')
    findings = [item for item in check(folder).findings if item.severity == "error"]
    assert [(item.kind, item.line) for item in findings] == [("metadata", k) for k in (6, 7, 9)] + [("path", 8)]
    assert "0xe9" in findings[1].message and "\udce9" not in json.dumps([item.message for item in findings])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_no_broken_file_stops_the_doctor(folder, form):
    generator = np.random.default_rng(0)
    path, mask = folder / "images/0.png", folder / "masks/0.png"
    photo(0).save(path, format=form)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(40):
        broken = whole.copy()
        broken[generator.integers(0, len(whole), 8)] = generator.integers(0, 256, 8)
        path.write_bytes(broken.tobytes())
        mask.write_bytes(broken.tobytes())
        assert isinstance(image_facts(path, 10**6), ImageFacts)
        assert isinstance(mask_facts(mask, PALETTE, 10**6), MaskFacts)


def test_copies_within_a_split_and_across_splits_another_palette_and_a_class_that_never_occurs(splits):
    photo(0).save(splits / "train/images/3.png", compress_level=0)  # other bytes, the same pixels
    photo(1).save(splits / "test/images/0.png")
    changed = np.array(photo(2))
    changed[:2, :2] ^= 1
    Image.fromarray(changed).save(splits / "test/images/1.png")
    Palette((*PALETTE.labels, Label(2, "lake", (0, 0, 255)))).save(splits / "test/palette.json")
    findings = check(splits).findings
    assert {(item.kind, item.split, item.row) for item in findings} == {
        ("palette", "test", None), ("leak", "test", 0), ("near_duplicate", "test", 1), ("duplicate", "train", 3),
        ("class_absent", "test", None),
    }  # fmt: skip
    found = {item.kind: item for item in findings}
    assert found["near_duplicate"].other == ("train", 2) and "lake" in found["class_absent"].message
    assert "train line 4: images/2.png" in found["near_duplicate"].message


def test_images_that_differ_in_one_pixel_are_no_copies(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    for row in (0, 1):
        pixels[7, 11] += np.uint8(row)  # between the sampled pixels
        Image.fromarray(pixels).save(folder / f"images/{row}.png")
        write_mask(folder / f"masks/{row}.png", np.zeros((300, 400), np.uint8), PALETTE)
    facts = [image_facts(folder / f"images/{row}.png", 10**6) for row in (0, 1)]
    assert facts[0].identity == facts[1].identity and check(folder).findings == ()
    Image.fromarray(pixels).save(folder / "images/0.png")
    (copy,) = check(folder).findings
    assert (copy.kind, copy.row, copy.file) == ("duplicate", 1, "images/1.png")


def test_nearest_counts_the_bits_that_differ_and_a_bit_is_a_step_that_brightens():
    generator = np.random.default_rng(0)
    hashes, others = (generator.integers(0, 1 << 63, n, np.uint64) for n in (50, 3000))
    others[1234] = hashes[7] ^ np.uint64(0b1011)
    best, bits = nearest_hashes(hashes, others)
    assert (best[7], bits[7]) == (1234, 3)
    assert bits[8] == min(bin(int(hashes[8]) ^ int(other)).count("1") for other in others) > NEAR
    assert nearest_hashes(hashes, others[:0])[1].min() > 64
    thumb = np.zeros((2, 8, 9), np.uint8)
    thumb[1, 0, 1:] = 1
    assert [int(value).bit_count() for value in dhash(thumb)] == [0, 1]


def test_quarantine_parts_the_rows_keeps_every_caption_and_overwrites_nothing(folder):
    captions = "a lake", ["a tree", "a hill\nat dusk"], " ", "a tree"
    (folder / "metadata.csv").unlink()
    write_metadata(folder, [(f"images/{k}.png", f"masks/{k}.png", said) for k, said in enumerate(captions)])
    (folder / "images/0.png").unlink()
    checkup = check(folder)
    assert "2 good rows, 2 bad ones" in quarantine(checkup, folder / "good.csv")
    good = read_split(folder / "good.csv")
    check_split(good)
    captions = [(record.image.name, *record.captions) for record in good.records]
    assert captions == [("1.png", "a tree"), ("1.png", "a hill at dusk"), ("3.png", "a tree")]
    bad = list(csv.DictReader((folder / "good.bad.csv").open()))
    assert [row["file_name"] for row in bad] == ["images/0.png", "images/2.png"]
    assert bad[0]["reason"].startswith("missing: ") and bad[1]["reason"].startswith("caption: ")
    with pytest.raises(UserError, match="is there already"):
        quarantine(checkup, folder / "good.csv")
    with pytest.raises(UserError, match="is there already"):
        validate(DoctorConfig(dataset_name=str(folder), quarantine=str(folder / "good.csv")), log=len)


def test_quarantine_of_splits_lies_above_them(splits):
    (splits / "test/masks/0.png").unlink()
    checkup = check(splits)
    quarantine(checkup, splits / "good.csv")
    assert [len(read_split(splits / f"good.{name}.csv")) for name in ("train", "test")] == [4, 2]
    with pytest.raises(UserError, match="or above it"):
        quarantine(checkup, splits / "train/good.csv")


def test_the_page_shows_broken_rows_and_escapes_what_comes_from_the_data_set(folder):
    set_caption(folder, 0, "<script>alert(1)</script> " * 20)
    Image.fromarray(np.full(SIZE, 9, np.uint8)).save(folder / "masks/0.png")  # an undeclared label
    (folder / "masks/1.png").write_bytes(b"nothing")
    write_mask(folder / "masks/2.png", np.zeros((8, 8), np.uint8), PALETTE)
    rows = (folder / "metadata.csv").read_text().replace("images/3.png", "images/<b>&3.png")
    (folder / "metadata.csv").write_text(rows)
    page = doctor_page(check(folder), DoctorConfig())
    assert "<script>" not in page and "<b>&3" not in page
    assert "&lt;script&gt;" in page and "&lt;b&gt;&amp;3.png" in page
    images = 2 * 2 + 1 + 2 + 1  # image and mask: of row 0 twice, as its caption is too long; what can be read of others
    assert page.count("data:image/png;base64,") == images
    assert "http" not in page  # it needs no other file


def test_the_command_writes_elsewhere_and_its_exit_code_says_whether_to_train(folder, tmp_path, monkeypatch, capsys):
    def validate(*words):
        monkeypatch.setattr(sys, "argv", ["segcn", "validate", str(folder), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code

    before = sorted(folder.rglob("*"))
    out = tmp_path / "report"
    set_caption(folder, 0, "2024")
    assert validate("--output_dir", str(out)) == 0  # a warning alone
    assert sorted(path.name for path in out.iterdir()) == ["doctor.html", "doctor.json"]
    (folder / "masks/1.png").write_bytes(b"nothing")
    assert validate("--output_dir", str(out)) == 1
    assert json.loads((out / "doctor.json").read_text())["errors"] == 1
    printed = capsys.readouterr().out
    assert "masks/1.png" in printed and f"segcn validate {folder} --quarantine {folder}/good.csv" in printed
    assert validate("--output_dir", str(folder / "report")) == 2
    assert sorted(folder.rglob("*")) == before


def test_training_trusts_a_report_on_these_very_files_and_refuses_one_with_errors(folder, tmp_path, monkeypatch):
    def reported():
        report.write_doctor_report(check(folder), DoctorConfig(dataset_name=str(folder)))
        return find_report(read_split(folder))

    said = []
    config, log = TrainConfig(dataset_name=str(folder)), SimpleNamespace(say=said.append)
    monkeypatch.setattr(report, "OUTPUTS", tmp_path / "outputs")
    assert find_report(read_split(folder)) is None
    check_rows(config, read_split(folder), tmp_path, log)
    (tmp_path / "outputs" / "doctor" / "cut").mkdir(parents=True)
    (tmp_path / "outputs" / "doctor" / "cut" / "doctor.json").write_text('{"splits": {')
    page, errors = reported()
    assert errors == 0 and page.is_file()
    check_rows(config, read_split(folder), tmp_path, log)
    assert "every image and mask decodes" in said[0] and str(page) in said[1]

    Image.new("L", (4, 4)).save(folder / "masks/1.png")
    assert find_report(read_split(folder)) is None  # the report was on other files
    with pytest.raises(UserError, match=r"line 3 \(row 1\)"):
        check_rows(config, read_split(folder), tmp_path, log)
    assert reported()[1] == 1
    with pytest.raises(UserError, match="found 1 errors in these rows"):
        check_rows(config, read_split(folder), tmp_path, log)
