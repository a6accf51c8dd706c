"""Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one."""

from dataclasses import dataclass

from segcn.utils.args import flag
from segcn.utils.paths import BASE, MAX_PIXELS

FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class DoctorConfig:
    """Decode every file of a data set and report what is wrong with it; exit code 1 where training would be wrong."""

    dataset_name: str = flag("", "data set folder, or its metadata.csv; may stand first without the flag")
    output_dir: str | None = flag(
        None, "folder of doctor.html and doctor.json; none: outputs/doctor/<data set>-<fingerprint>"
    )
    quarantine: str | None = flag(
        None, "OUT.csv to write the good rows to; the bad ones go to OUT.bad.csv with the reason"
    )
    pretrained_model_name_or_path: str = flag(str(BASE), "base model, for the length of captions in its tokens")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    max_pixels: int = flag(MAX_PIXELS, "pixels of an image that are refused unread; the default is Pillow's limit")
    examples: int = flag(4, "images in the report of each kind of fault")


@dataclass(frozen=True)
class PaletteConfig:
    """Write a palette.json for masks that have none: a ready one that they fit, or one proposed from what they hold."""

    dataset_name: str = flag("", "folder of masks, or data set folder; may stand first without the flag")
    ready: str | None = flag(
        None, "ready palette: ade20k, cityscapes, voc, coco-stuff, binary ...; an unknown name lists all"
    )
    names: str | None = flag(None, "names of the proposed classes in the order of their ids: sky,grass,lake")
    output: str | None = flag(None, "PALETTE.json to write; none: palette.json in the folder")


@dataclass(frozen=True)
class ImportConfig:
    """Write a data set of the contract (data/README.md) from pairs of files, a metadata file or a saved `datasets`."""

    source: str = flag("", "folder, or a .csv, .jsonl, .json or .parquet file; may stand first without the flag")
    out: str = flag("", "data set folder to write, empty or absent; may stand second without the flag")
    files: str = flag(
        "copy",
        "copy: bytes unchanged; symlink: link to them; rewrite: leave them, write metadata to OUT, a folder above them",
        ("copy", "symlink", "rewrite"),
    )
    palette: str | None = flag(
        None, "a ready palette's name (segcn palette), or a palette.json; none: found at SOURCE, else proposed"
    )
    caption: str | None = flag(
        None, "for rows without one; {classes} stands for those in the mask, largest first: 'a scene of {classes}'"
    )
    test: int = flag(0, "rows to hold out in test/, drawn at random from a SOURCE without splits; 0: none")
    image_column: str | None = flag(None, "column of the images; none: file_name, or image")
    conditioning_image_column: str | None = flag(
        None, "column of the masks; none: conditioning_image_file_name, or conditioning_image"
    )
    caption_column: str | None = flag(None, "column of the captions; none: text")
    image_suffix: str = flag("", "ending of the images' names that their masks lack: _leftImg8bit")
    mask_suffix: str = flag("", "ending of the masks' names that their images lack: _mask")
