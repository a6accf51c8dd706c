"""Settings of the commands that read and write data sets: validate, palette and import."""

from dataclasses import dataclass

from segcn.utils.args import flag
from segcn.utils.paths import BASE, MAX_PIXELS

# The colors are those of the benchmarks. Where two classes share one, the later class has the nearest free color that
# is as far from all others as they usually are: 1 in ADE20K, 9 in COCO-Stuff, 1 ignored label in Cityscapes.
READY = ("ade20k", "ade20k-from-0", "cityscapes", "cityscapes-labelids", "voc", "coco-stuff", "coco-stuff-from-0",
         "binary")  # fmt: skip
FITS = ("crop", "pad", "stretch")
BUCKET = "bucket"  # in their place with --buckets
BUCKETS = "keep the shapes of images: sizes of about --resolution x --resolution pixels; what does not fit is cropped"
SMALL = "small"  # the segmenter's architecture that is our own
ARCHITECTURE = (
    "of the segmenter that is trained: small, or a folder of AutoModelForSemanticSegmentation (SegFormer ...): its"
    " config.json, and weights where it shall start from some"
)


@dataclass(frozen=True)
class DoctorConfig:
    """Decode every file of a data set and report every fault; exit code 1 where training would fail or go wrong."""

    dataset_name: str = flag("", "data set folder, or its metadata.csv")
    output_dir: str | None = flag(None, "folder of doctor.html and doctor.json; none: one in outputs/doctor")
    quarantine: str | None = flag(None, "OUT.csv for the good rows; the bad ones go to OUT.bad.csv with the reason")
    pretrained_model_name_or_path: str = flag(str(BASE), "base model, for the length of captions in its tokens")
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    max_pixels: int = flag(MAX_PIXELS, "larger images are refused before decoding (Pillow's limit)", low=1)
    examples: int = flag(4, "images of each kind of fault in the report", low=0)


@dataclass(frozen=True)
class PaletteConfig:
    """Write a palette.json for masks that have none: a ready one that fits, or one proposed from the masks."""

    dataset_name: str = flag("", "folder of masks, or data set folder")
    ready: str | None = flag(None, f"ready palette: {', '.join(READY)}")
    names: str | None = flag(None, "names of the proposed classes in the order of their ids: sky,grass,lake")
    output: str | None = flag(None, "PALETTE.json to write; none: palette.json in the folder")


@dataclass(frozen=True)
class ImportConfig:
    """Write a data set of this package (data/README.md) from image files, a metadata file or a saved `datasets`."""

    source: str = flag("", "folder, or a .csv, .jsonl, .json or .parquet file")
    out: str = flag("", "data set folder to write, empty or absent")
    files: str = flag(
        "copy",
        "copy: same bytes; symlink: link to them; rewrite: only write metadata to OUT, a folder above the files",
        ("copy", "symlink", "rewrite"),
    )
    palette: str | None = flag(None, "name of a ready palette, or a palette.json; none: found at SOURCE, else proposed")
    caption: str | None = flag(
        None, "for rows without one; {classes} becomes those in the mask: 'a scene of {classes}'"
    )
    threshold: int | None = flag(None, "masks of dark and light: light is class 1, from this value on", low=1, high=255)
    unlabelled: list[int] = flag([], "values of the masks that mean unlabelled, such as 0 or 255", low=0, high=65535)
    window: str = flag("", "LOW,HIGH: numbers of deep images that become black and white; or percentiles: 1%%,99%%")
    merge_masks: str | None = flag(
        None,
        "one binary mask an object, in a folder named as its image: its class is one for all, or the file's name",
        ("one", "name"),
    )
    skip_unpaired: bool = flag(False, "leave out images without a mask, masks without an image, rows without a mask")
    tile: int | None = flag(
        None,
        "cut images and masks into squares of this size in pixels; none: leave them whole",
        low=1,
    )
    overlap: int = flag(0, "pixels by which neighboring tiles overlap, at least", low=0)
    test: int = flag(0, "rows for test/, drawn at random from a SOURCE without splits; 0: none", low=0)
    image_column: str | None = flag(None, "column of the images; none: file_name, or image")
    conditioning_image_column: str | None = flag(
        None, "column of the masks; none: conditioning_image_file_name, or conditioning_image"
    )
    caption_column: str | None = flag(None, "column of the captions; none: text")
    split_column: str | None = flag(None, "column of the splits; none: split, where there is one")
    group_column: str | None = flag(None, "column of patients or the like: --test takes whole groups")
    slice_axis: int = flag(2, "axis along which NIfTI volumes are cut into slices", low=0, high=2)
    image_suffix: str = flag("", "ending of the images' names that their masks do not have: _leftImg8bit")
    mask_suffix: str = flag("", "ending of the masks' names that their images do not have: _mask")
    image_prefix: str = flag("", "beginning of the images' names that their masks do not have: img_")
    mask_prefix: str = flag("", "beginning of the masks' names that their images do not have: mask_")
