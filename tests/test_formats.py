"""Promise: annotations of other tools become exact class ids, and patients stay on one side of a split."""

import json

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from segcn.data.config import DoctorConfig, ImportConfig
from segcn.data.doctor.findings import examine
from segcn.data.importers.importer import import_dataset
from segcn.data.masks import read_mask
from segcn.data.metadata import read_row, read_split
from segcn.utils.errors import UserError

WIDTH, HEIGHT = 24, 20
BOX, SMALL = (4, 6, 14, 16), (8, 8, 12, 12)  # left, top, right, bottom


def photos(folder, names=("a.png", "b.png")):
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        noise = np.random.default_rng(k).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)


def corners(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def boxes(outer, inner):
    """uint8 [20, 24]: the large box, and the small one in front of it."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for (left, top, right, bottom), id in ((BOX, outer), (SMALL, inner)):
        mask[top:bottom, left:right] = id
    return mask


def brought(source, out, split="train", **settings):
    """The masks, and the names of the classes, of an import without faults."""
    import_dataset(ImportConfig(str(source), str(out), caption="a scene", **settings), str)
    assert examine(DoctorConfig(str(out)), str).errors == ()
    found = read_split(out, split)
    return [read_mask(record.mask, found.palette) for record in found.records], found.palette.names


def coco_file(path, more=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = np.zeros((HEIGHT, WIDTH), bool)
    runs[2:5, 1:3] = True
    flat, counts = runs.T.ravel(), []
    value = False
    while len(flat):
        stop = int(np.argmax(flat != value)) if (flat != value).any() else len(flat)
        counts.append(stop)
        flat, value = flat[stop:], not value
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 90, "segmentation": [corners(*SMALL)], "area": 16, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "segmentation": [corners(*BOX)], "area": 100, "iscrowd": 0},
        {"id": 3, "image_id": 9, "category_id": 5, "iscrowd": 1, "area": 6,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}},
    ]  # fmt: skip
    images = [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
              {"id": 9, "file_name": "b.png", "height": HEIGHT, "width": WIDTH}]  # fmt: skip
    categories = [{"id": 90, "name": "cat"}, {"id": 5, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return boxes(1, 2), runs.astype(np.uint8)


@pytest.mark.parametrize("named", [True, False])
def test_coco_instances_are_classes_in_the_order_of_their_categories(tmp_path, named):
    photos(tmp_path / "in" / "images")
    wanted = coco_file(tmp_path / "in" / "annotations" / "instances.json")
    source = tmp_path / "in" / "annotations" / "instances.json" if named else tmp_path / "in"
    found, names = brought(source, tmp_path / "out")
    assert names == ("background", "dog", "cat")
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_coco_panoptic_segments_get_the_class_of_their_category(tmp_path):
    photos(tmp_path / "images", ("a.png",))
    (tmp_path / "panoptic").mkdir()
    codes = boxes(3, 200).astype(np.int64) * 300
    Image.fromarray(np.dstack([codes % 256, codes // 256 % 256, codes // 65536]).astype(np.uint8)).save(
        tmp_path / "panoptic" / "a.png"
    )
    segments = [{"id": 900, "category_id": 2}, {"id": 60000, "category_id": 1}]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "sky"}, {"id": 2, "name": "road"}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(data))
    found, names = brought(tmp_path / "panoptic.json", tmp_path / "out")
    assert np.array_equal(found[0], boxes(2, 1)) and names == ("background", "sky", "road")


def test_yolo_polygons_are_read_in_shares_of_the_sides_and_boxes_are_refused(tmp_path):
    photos(tmp_path / "in" / "images")
    (tmp_path / "in" / "labels").mkdir()
    (tmp_path / "in" / "data.yaml").write_text("names: {0: dog, 1: cat}\n")
    sides = np.array([WIDTH, HEIGHT] * 4)
    lines = [f"{k} " + " ".join(map(str, np.array(corners(*box)) / sides)) for k, box in ((1, SMALL), (0, BOX))]
    (tmp_path / "in" / "labels" / "a.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "in" / "labels" / "b.txt").write_text("")
    found, names = brought(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(found[0], boxes(1, 2)) and not found[1].any() and names == ("background", "dog", "cat")
    (tmp_path / "in" / "labels" / "b.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(UserError, match=r"b\.txt, line 1: expected CLASS x y x y x y ..., found a box"):
        brought(tmp_path / "in", tmp_path / "o2")


def test_labelme_polygons_and_rectangles_are_read(tmp_path):
    photos(tmp_path / "in")
    outline = np.array(corners(*BOX)).reshape(-1, 2).tolist()
    shapes = [{"label": "cat", "points": [SMALL[:2], SMALL[2:]], "shape_type": "rectangle"},
              {"label": "dog", "points": outline, "shape_type": "polygon"}]  # fmt: skip
    for name, some in (("a", shapes), ("b", shapes[1:])):
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps({"imagePath": f"{name}.png", "shapes": some}))
    found, names = brought(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(found[0], boxes(2, 1)) and names == ("background", "cat", "dog")


def test_cvat_polygons_boxes_and_masks_are_read(tmp_path):
    photos(tmp_path / "in" / "images")
    points = ";".join(f"{x},{y}" for x, y in np.array(corners(*BOX)).reshape(-1, 2))
    left, top, right, bottom = SMALL
    (tmp_path / "in" / "annotations.xml").write_text(f"""<annotations>
<meta><task><labels><label><name>dog</name></label><label><name>cat</name></label></labels></task></meta>
<image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}"><polygon label="dog" points="{points}"/>
<box label="cat" xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"/></image>
<image id="1" name="b.png" width="{WIDTH}" height="{HEIGHT}">
<mask label="cat" rle="1,4,1" left="3" top="5" width="3" height="2"/></image></annotations>""")
    found, names = brought(tmp_path / "in", tmp_path / "out")
    run = np.zeros((HEIGHT, WIDTH), np.uint8)
    run[5, 4:6] = run[6, 3:5] = 2
    assert np.array_equal(found[0], boxes(1, 2)) and np.array_equal(found[1], run)
    assert names == ("background", "dog", "cat")


def volumes(folder, patients=4, slices=6):
    """int16 images and class ids of small volumes, [x, y, z]; the first slice of each mask is empty."""
    made = {}
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for k in range(patients):
        noise = np.random.default_rng(k).integers(-1000, 1000, (WIDTH, HEIGHT, slices)).astype(np.int16)
        mask = np.zeros((WIDTH, HEIGHT, slices), np.uint8)
        mask[3:9, 2:7, 1:] = 1 + k % 2
        for name, array in (("imagesTr", noise), ("labelsTr", mask)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name / f"p{k}.nii.gz")
        made[f"p{k}"] = noise, mask
    return made


def test_volumes_are_cut_into_slices_and_patients_stay_on_one_side(tmp_path, capsys):
    made = volumes(tmp_path / "in")
    settings = {"caption": "a scan", "window": "-160,240", "test": 3}
    import_dataset(ImportConfig(str(tmp_path / "in"), str(tmp_path / "out"), **settings), str)
    assert "24 slices of 4 volumes; left out: 4 whose mask is empty" in capsys.readouterr().out
    sides = {}
    for split in ("train", "test"):
        found = read_split(tmp_path / "out", split)
        lines = found.metadata.read_text().splitlines()[1:]
        sides[split] = {line.split(",")[3] for line in lines}
        for row, line in enumerate(lines):
            _, _, _, patient, number = line.split(",")
            noise, mask = (each[:, :, int(number)].T for each in made[patient])
            image, ids = read_row(found, row)
            assert np.array_equal(ids, mask)
            assert np.array_equal(image[..., 0], (((noise + 160.0) / 400).clip(0, 1) * 255).round().astype(np.uint8))
    assert not sides["train"] & sides["test"] and len(sides["test"]) == 1 and len(sides["train"]) == 3


def test_stacks_of_pages_are_cut_into_slices(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "in" / name).mkdir(parents=True)
    pages = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (HEIGHT, WIDTH), np.uint8)) for k in range(3)]
    masks = [Image.fromarray(boxes(1, 2)) for _ in range(3)]
    for name, each in (("images", pages), ("masks", masks)):
        each[0].save(tmp_path / "in" / name / "s.tif", save_all=True, append_images=each[1:])
    found, _ = brought(tmp_path / "in", tmp_path / "out", window="0,255")
    assert len(found) == 3 and all(np.array_equal(mask, boxes(1, 2)) for mask in found)
    image = read_row(read_split(tmp_path / "out"), 1)[0]
    assert np.array_equal(image[..., 0], np.asarray(pages[1]))


def test_dicom_images_are_scaled_in_their_units(tmp_path):
    stored = np.random.default_rng(0).integers(0, 2000, (HEIGHT, WIDTH)).astype(np.uint16)
    for name in ("images", "masks"):
        (tmp_path / "in" / name).mkdir(parents=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    scan = pydicom.Dataset()
    scan.file_meta = meta
    scan.SOPClassUID, scan.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    scan.Rows, scan.Columns, scan.SamplesPerPixel, scan.PhotometricInterpretation = HEIGHT, WIDTH, 1, "MONOCHROME2"
    scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 16, 15, 0
    scan.RescaleSlope, scan.RescaleIntercept, scan.PixelData = 1, -1024, stored.tobytes()
    scan.save_as(tmp_path / "in" / "images" / "1.dcm", enforce_file_format=True)
    Image.fromarray(boxes(1, 2)).save(tmp_path / "in" / "masks" / "1.png")
    found, _ = brought(tmp_path / "in", tmp_path / "out", window="-160,240")
    image = read_row(read_split(tmp_path / "out"), 0)[0][..., 0]
    assert np.array_equal(image, (((stored - 1024.0 + 160) / 400).clip(0, 1) * 255).round().astype(np.uint8))
    assert np.array_equal(found[0], boxes(1, 2))


def test_a_class_dict_gives_the_palette(tmp_path):
    photos(tmp_path / "in" / "images")
    (tmp_path / "in" / "masks").mkdir()
    colors = np.array([(10, 20, 30), (0, 200, 0), (250, 0, 0)], np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(colors[boxes(1, 2)]).save(tmp_path / "in" / "masks" / name)
    (tmp_path / "in" / "class_dict.csv").write_text("name,r,g,b\nground,10,20,30\ntree,0,200,0\ncar,250,0,0\n")
    found, names = brought(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(found[0], boxes(1, 2)) and names == ("ground", "tree", "car")


def test_label_studios_brushes_are_joined_by_their_task(tmp_path):
    photos(tmp_path / "in" / "images")
    (tmp_path / "in" / "tasks.json").write_text(json.dumps([
        {"id": 11, "data": {"image": "/data/upload/1/0c4ff5ab-a.png"}}, {"id": 12, "data": {"image": "b.png"}},
        {"id": 13, "data": {"image": "not-labelled.png"}},
    ]))  # fmt: skip
    for task, tag, id in ((11, "left dog", 1), (11, "cat", 2), (12, "cat", 2)):
        brush = (boxes(1, 2) == id).astype(np.uint8) * 255
        Image.fromarray(brush).save(tmp_path / "in" / f"task-{task}-annotation-5-by-1-tag-{tag}-0.png")
    found, names = brought(tmp_path / "in", tmp_path / "out")
    assert names == ("background", "cat", "left dog")
    assert np.array_equal(found[0], boxes(2, 1)) and np.array_equal(found[1], boxes(0, 1))


def test_images_of_coco_a_stack_and_volumes_are_cut_into_tiles_alike(tmp_path):
    photos(tmp_path / "coco/images")
    wanted = {"coco": list(coco_file(tmp_path / "coco/annotations/instances.json")), "stack": [boxes(1, 2)] * 2}
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    for name, page in (("images", noise), ("masks", boxes(1, 2))):
        (tmp_path / "stack" / name).mkdir(parents=True)
        pages = [Image.fromarray(page)] * 2
        pages[0].save(tmp_path / "stack" / name / "s.tif", save_all=True, append_images=pages[1:])
    scans = volumes(tmp_path / "volumes", patients=2, slices=3)
    wanted["volumes"] = [mask[:, :, k].T for _, mask in scans.values() for k in (1, 2)]
    for source, masks in wanted.items():
        found, _ = brought(tmp_path / source, tmp_path / f"{source}_out", tile=16, overlap=4, window="0,255")
        tiles = [mask[top : top + 16, left : left + 16] for mask in masks for top in (0, 4) for left in (0, 8)]
        assert len(found) == len(tiles) and all(np.array_equal(*pair) for pair in zip(found, tiles, strict=True))
