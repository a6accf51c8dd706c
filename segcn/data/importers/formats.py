"""Annotations of other tools as rows: COCO, YOLO, LabelMe, CVAT, Label Studio; volumes and stacks cut into slices.

A pixel gets the class of the shape that covers it, the smallest shape in front; what no shape covers is class 0."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageSequence

from segcn.data.config import ImportConfig
from segcn.data.files import READABLE
from segcn.data.importers.palettes import SUFFIXES, spread_colors
from segcn.data.importers.tables import Row, captions_of
from segcn.data.palette import IGNORE, Label, Palette
from segcn.utils.errors import UserError

BRUSH = re.compile(r"task-(\d+)-annotation-\d+-by-.*?-tag-(.+)-\d+\.png")
VOLUMES, DICOM = (".nii", ".nii.gz"), ".dcm"


class Shape(NamedTuple):
    """A class, and where it is: polygons of x, y, x, y, ... in pixels, or a mask, bool [H, W]."""

    name: str
    where: list[list[float]] | np.ndarray


@dataclass(frozen=True)
class Annotated:
    """An image file and its shapes."""

    where: str
    image: Path
    shapes: Sequence[Shape]


def library(name: str) -> Any:
    """A reader of one format; UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        needed = name.partition(".")[0]
        raise UserError(f"this format needs {needed}: pip install 'segcn[formats]'") from None


def class_palette(names: Iterable[str]) -> Palette:
    """Background and these classes from id 1 on, in colors far apart; UserError for more than 254."""
    named = [name for name in dict.fromkeys(names) if name != "background"]
    if len(named) >= IGNORE:
        raise UserError(f"expected at most 254 classes beside the background, found {len(named)}")
    colors = ((0, 0, 0), *spread_colors())
    return Palette(tuple(Label(id, *each) for id, each in enumerate(zip(["background", *named], colors, strict=False))))


def annotated_rows(found: Iterable[Annotated], palette: Palette, config: ImportConfig) -> Iterator[Row]:
    """Rows whose masks are drawn from shapes, one at a time."""
    ids = {label.name: label.id for label in palette.labels}
    for one in found:
        with Image.open(one.image) as image:
            width, height = image.size
        masks = [(ids[shape.name], inside(shape.where, height, width)) for shape in one.shapes]
        mask = np.zeros((height, width), np.uint8)
        for id, where in sorted(masks, key=lambda pair: -int(pair[1].sum())):
            mask[where] = id
        yield Row(one.where, one.image, as_png(mask), captions_of(None, config))


def inside(where: list[list[float]] | np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels of a shape, bool [H, W], as pycocotools counts them."""
    if isinstance(where, np.ndarray):
        return where
    polygons = [polygon for polygon in where if len(polygon) >= 6]
    if not polygons:
        return np.zeros((height, width), bool)
    coco = library("pycocotools.mask")
    return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)


def as_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W] as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def find_image(name: str, *folders: Path) -> Path:
    """An image by the name that an annotation gives it, in the first of these folders that has it; UserError."""
    for folder in folders:
        for path in (folder / name, folder / Path(name.replace("\\", "/")).name):
            if path.is_file():
                return path.absolute()
    raise UserError(f"expected the image {name!r} in {' or '.join(map(str, folders))}, found none")


def tool_of(path: Path) -> str:
    """The tool that wrote a .json file: "coco" (instances or panoptic), "labelme" or "label studio"; else ""."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return ""
    if isinstance(found, list):
        return "label studio" if found and isinstance(found[0], dict) and {"id", "data"} <= set(found[0]) else ""
    keys = set(found) if isinstance(found, dict) else set()
    if {"images", "annotations", "categories"} <= keys:
        return "coco"
    return "labelme" if {"shapes", "imagePath"} <= keys else ""


# COCO (https://cocodataset.org/#format-data)


def coco(path: Path) -> tuple[Palette, Callable[[], Iterator[Annotated]], int]:
    """Palette, annotated images and their number; classes are numbered from 1 in the order of the categories' ids."""
    found = json.loads(path.read_bytes())
    names = {one["id"]: one["name"] for one in sorted(found["categories"], key=lambda one: one["id"])}
    panoptic = {one["image_id"]: one for one in found["annotations"] if "segments_info" in one}
    if not panoptic:
        with contextlib.redirect_stdout(io.StringIO()):
            data = library("pycocotools.coco").COCO(str(path))
    word = path.stem.rpartition("_")[2]  # instances_train2017: beside a folder train2017
    folders = [place / below for place in (path.parent, path.parent.parent) for below in ("", "images", word)]

    def shapes_of(image: dict) -> list[Shape]:
        if panoptic:
            one = panoptic.get(image["id"])
            if one is None:
                return []
            place = find_image(one["file_name"], path.with_suffix(""), path.parent)
            with Image.open(place) as stored:
                red, green, blue = np.moveaxis(np.asarray(stored.convert("RGB")).astype(np.int64), -1, 0)
            segments = red + 256 * green + 65536 * blue
            return [Shape(names[each["category_id"]], segments == each["id"]) for each in one["segments_info"]]
        return [Shape(names[one["category_id"]], data.annToMask(one).astype(bool))
                for one in data.imgToAnns.get(image["id"], ())]  # fmt: skip

    def images() -> Iterator[Annotated]:
        for image in sorted(found["images"], key=lambda one: one["id"]):
            where = f"{path}, image {image['file_name']}"
            try:
                yield Annotated(where, find_image(image["file_name"], *folders), shapes_of(image))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{where}: cannot be read as COCO: {error!r}") from None

    return class_palette(names.values()), images, len(found["images"])


# YOLO: a .txt of "class x y x y ..." for each image, in shares of its sides


def yolo(folder: Path, photos: dict[str, Path], labels: dict[str, Path]) -> tuple[Palette, Callable, int]:
    """The same of images and label files by their names; class k is id k + 1, named in data.yaml or classes.txt."""
    texts = {name: path.read_text().splitlines() for name, path in labels.items()}
    lines = {name: [line.split() for line in text if line.strip()] for name, text in texts.items()}
    for name, each in lines.items():
        for number, words in enumerate(each, 1):
            if len(words) < 7 or len(words) % 2 == 0 or not words[0].isdigit():
                kind = "a box, which is no mask" if len(words) == 5 else " ".join(words)[:60]
                raise UserError(f"{labels[name]}, line {number}: expected CLASS x y x y x y ..., found {kind}")
    most = max((int(words[0]) for each in lines.values() for words in each), default=0)
    names = yolo_names(folder) or [f"class_{k}" for k in range(most + 1)]
    if most >= len(names):
        raise UserError(f"{folder}: expected a name for each class, found {len(names)} names and the class {most}")

    def images() -> Iterator[Annotated]:
        for name in sorted(photos.keys() & labels.keys()):
            with Image.open(photos[name]) as image:
                sides = np.array(image.size)
            points = [(np.array(words[1:], float).reshape(-1, 2) * sides).ravel().tolist() for words in lines[name]]
            shapes = [Shape(names[int(words[0])], [each]) for words, each in zip(lines[name], points, strict=True)]
            yield Annotated(str(photos[name]), photos[name].absolute(), shapes)

    return class_palette(names), images, len(photos.keys() & labels.keys())


def yolo_names(folder: Path) -> list[str]:
    """The classes of data.yaml or classes.txt in a folder or the one above; empty where there is none."""
    for place in (folder, folder.parent):
        for path in (*place.glob("*.yaml"), *place.glob("*.yml")):
            names = (library("yaml").safe_load(path.read_text()) or {}).get("names")
            if names:
                return [str(names[k]) for k in sorted(names)] if isinstance(names, dict) else list(map(str, names))
        if (place / "classes.txt").is_file():
            return (place / "classes.txt").read_text().splitlines()
    return []


# LabelMe (https://github.com/wkentaro/labelme): a .json beside each image


def labelme(paths: Sequence[Path]) -> tuple[Palette, Callable, int]:
    """The same of LabelMe's files: polygons and rectangles; classes in the order of the alphabet."""
    found = {path: json.loads(path.read_bytes()) for path in paths}
    for path, data in found.items():
        for shape in data["shapes"]:
            if shape.get("shape_type", "polygon") not in ("polygon", "rectangle"):
                raise UserError(
                    f"{path}: expected polygons and rectangles, found a {shape['shape_type']} ({shape['label']})"
                )

    def images() -> Iterator[Annotated]:
        for path, data in found.items():
            shapes = []
            for shape in data["shapes"]:
                points = shape["points"]
                if shape.get("shape_type") == "rectangle":
                    (left, top), (right, bottom) = points
                    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
                shapes.append(Shape(shape["label"], [[float(number) for point in points for number in point]]))
            yield Annotated(str(path), find_image(data["imagePath"], path.parent), shapes)

    names = sorted({shape["label"] for data in found.values() for shape in data["shapes"]})
    return class_palette(names), images, len(found)


# CVAT (https://docs.cvat.ai/docs/manual/advanced/xml_format/): one .xml for all images


def cvat(path: Path) -> tuple[Palette, Callable, int]:
    """The same of CVAT's XML for images: polygons, boxes and masks; classes in the order of the task's labels."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: expected CVAT's XML: {error}") from None
    elements = root.findall("image")
    if root.tag != "annotations" or not elements:
        raise UserError(f"{path}: expected CVAT's XML for images, with <annotations> and <image>, found <{root.tag}>")
    names = [name.text or "" for name in root.findall("meta//labels/label/name")]
    names += sorted({shape.get("label", "") for image in elements for shape in image} - set(names))

    def images() -> Iterator[Annotated]:
        for image in elements:
            size = int(image.get("height", 0)), int(image.get("width", 0))
            where = f"{path}, image {image.get('name')}"
            shapes = [Shape(shape.get("label", ""), cvat_shape(shape, size, where)) for shape in image]
            place = find_image(image.get("name", ""), path.parent, path.parent / "images")
            yield Annotated(where, place, shapes)

    return class_palette(names), images, len(elements)


def cvat_shape(shape: ElementTree.Element, size: tuple[int, int], where: str) -> list[list[float]] | np.ndarray:
    """A polygon, a box or a mask (runs of pixels off and on, within its box)."""
    if shape.tag == "polygon":
        return [[float(number) for point in shape.get("points", "").split(";") for number in point.split(",")]]
    if shape.tag == "box":
        left, top, right, bottom = (float(shape.get(key, 0)) for key in ("xtl", "ytl", "xbr", "ybr"))
        return [[left, top, right, top, right, bottom, left, bottom]]
    if shape.tag != "mask":
        raise UserError(f"{where}: expected polygons, boxes and masks, found a {shape.tag}")
    left, top, width, height = (int(shape.get(key, 0)) for key in ("left", "top", "width", "height"))
    runs = [int(number) for number in shape.get("rle", "").split(",")]
    bits = np.repeat(np.arange(len(runs)) % 2, runs)
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = bits.reshape(height, width)
    return mask


# Label Studio's brushes: a PNG of each label of a task, and the tasks' .json


def label_studio(path: Path) -> tuple[Palette, Callable, int]:
    """The same of task-1-annotation-2-by-3-tag-NAME-0.png below the folder of the tasks' file."""
    brushes: dict[int, list[tuple[str, Path]]] = {}
    for place in sorted(path.parent.rglob("task-*-tag-*.png")):
        if found := BRUSH.fullmatch(place.name):
            brushes.setdefault(int(found[1]), []).append((found[2], place))
    tasks = [task for task in json.loads(path.read_bytes()) if task["id"] in brushes]
    if not tasks:
        raise UserError(
            f"{path}: expected brushes of its tasks, such as task-1-annotation-2-by-3-tag-NAME-0.png, found none"
        )

    def images() -> Iterator[Annotated]:
        for task in tasks:
            name = Path(str(next(iter(task["data"].values())))).name
            places = [path.parent, path.parent / "images"]
            try:
                image = find_image(name, *places)
            except UserError:  # an upload has a code before its name
                image = find_image(name.partition("-")[2], *places)
            shapes = [Shape(label, brushed(place)) for label, place in brushes[task["id"]]]
            yield Annotated(f"{path}, task {task['id']}", image, shapes)

    names = sorted({label for some in brushes.values() for label, _ in some})
    return class_palette(names), images, len(tasks)


def brushed(path: Path) -> np.ndarray:
    """The pixels under a brush, bool [H, W]."""
    try:
        with Image.open(path, formats=READABLE) as image:
            return np.asarray(image.convert("L")) > 127
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


# Volumes (NIfTI) and stacks (TIFF of several pages), cut into slices


def volume_name(path: Path) -> str:
    """The name of a volume without its extension; "" for another file."""
    ending = next((ending for ending in VOLUMES if path.name.lower().endswith(ending)), None)
    if ending:
        return path.name[: -len(ending)]
    if path.suffix.lower() not in (".tif", ".tiff"):
        return ""
    try:
        with Image.open(path, formats=READABLE) as image:
            return path.stem if getattr(image, "n_frames", 1) > 1 else ""
    except OSError:
        return ""


def read_volume(path: Path, axis: int) -> np.ndarray:
    """A volume or stack as numbers, its slices first: [S, H, W]; axis: of a NIfTI, the one that is cut."""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with Image.open(path, formats=READABLE) as image:
                return np.stack([np.asarray(page) for page in ImageSequence.Iterator(image)])
        volume = np.asarray(library("nibabel").load(path).dataobj)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: the volume cannot be read: {error}") from None
    if volume.ndim != 3:
        raise UserError(f"{path}: expected a volume of three axes, found {volume.shape}")
    return np.moveaxis(volume, axis, 0).swapaxes(1, 2)  # NIfTI counts x first


def window_of(text: str) -> Callable[[np.ndarray], tuple[float, float]]:
    """--window as a function from numbers to what becomes black and white: LOW,HIGH or percentiles; "": 0.5%,99.5%."""
    parts = re.fullmatch(r"\s*(-?[\d.]+)(%?)\s*,\s*(-?[\d.]+)(%?)\s*", text or "0.5%,99.5%")
    if parts is None:
        raise UserError(f"--window: expected LOW,HIGH as in -160,240, or percentiles as in 1%,99%; found {text!r}")

    def window(values: np.ndarray) -> tuple[float, float]:
        low, high = (float(np.percentile(values, float(number))) if percent else float(number)
                     for number, percent in (parts.groups()[:2], parts.groups()[2:]))  # fmt: skip
        if low >= high:
            raise UserError(f"--window {text}: expected LOW below HIGH, found {low:g} and {high:g}")
        return low, high

    return window


def sliced_rows(pairs: Sequence[tuple[str, Path, Path]], config: ImportConfig, window: Callable) -> Iterator[Row]:
    """The slices of pairs (name, volume, mask volume) in which the mask has any class, with patient and slice.

    window: as `window_of` gives it, asked for each volume. UserError for other sizes or labels.
    """
    for name, image_path, mask_path in pairs:
        images, masks = (read_volume(path, config.slice_axis) for path in (image_path, mask_path))
        if images.shape != masks.shape:
            raise UserError(f"{mask_path}: expected the size of its image, {images.shape}, found {masks.shape}")
        if masks.min() < 0 or masks.max() > IGNORE or np.any(masks != masks.astype(np.uint8)):
            raise UserError(f"{mask_path}: expected class ids from 0 to 255, found {masks.min():g} to {masks.max():g}")
        low, high = window(images)
        for number in range(len(images)):
            if not masks[number].any():
                continue
            share = (images[number].astype(np.float64) - low) / (high - low)
            pixels = (np.nan_to_num(share).clip(0, 1) * 255).round().astype(np.uint8)
            more = (("patient", name), ("slice", str(number)))
            mask = as_png(masks[number].astype(np.uint8))
            where = f"{image_path}, slice {number}"
            yield Row(where, as_png(pixels), mask, captions_of(None, config), "", more, name)


def volumes_below(folder: Path) -> dict[str, Path]:
    """The volumes and stacks of a folder by their name; empty where it has none."""
    found = {volume_name(path): path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}
    return {name: path.absolute() for name, path in found.items() if name}


def read_dicom(path: Path) -> np.ndarray:
    """A DICOM image in its units, [H, W]: stored numbers times slope plus intercept, white where it says so."""
    try:
        found = library("pydicom").dcmread(path)
        numbers = found.pixel_array * float(found.get("RescaleSlope", 1)) + float(found.get("RescaleIntercept", 0))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: the DICOM image cannot be read: {error}") from None
    if numbers.ndim != 2:
        raise UserError(f"{path}: expected a grey image, found {numbers.shape}")
    return -numbers if found.get("PhotometricInterpretation") == "MONOCHROME1" else numbers


def class_dict(path: Path) -> Palette:
    """The palette of a class_dict.csv: lines of name, r, g, b under a header; ids in their order."""
    lines = [line.split(",") for line in path.read_text(encoding="utf-8-sig").splitlines()[1:] if line.strip()]
    try:
        labels = [Label(id, name.strip(), (int(r), int(g), int(b))) for id, (name, r, g, b) in enumerate(lines)]
    except ValueError:
        raise UserError(f"{path}: expected lines of name,r,g,b under a header") from None
    return Palette(tuple(labels))


def has_texts(folder: Path) -> bool:
    """Whether a folder of labels, or those below it, hold YOLO's texts and no images."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    texts = [path for path in files if path.suffix == ".txt"]
    return bool(texts) and not any(path.suffix.lower() in SUFFIXES for path in files)
