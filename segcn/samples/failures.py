"""What the usual failures look like: each provoked on the sample data, beside the picture as it should be."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from segcn import show
from segcn.arguments import make
from segcn.config import BASE, SampleConfig
from segcn.masks import colourise
from segcn.pipeline import Painter, generate, load_painter
from segcn.records import Split, read_split
from segcn.samples.measure import save_grid
from segcn.train import train
from segcn.train_config import TrainConfig

EXAMPLES = 2  # rows that each failure is shown on
HEADS = ("mask", "real image", "as it should be", "as it fails")


@dataclass(frozen=True)
class Recipe:
    """How long the two ControlNets that fail are trained, and on how many rows."""

    early_steps: int = 40  # too few to obey well
    early_rows: int = 64
    copying_steps: int = 250  # too many for so few rows
    copied_rows: int = 4


@dataclass(frozen=True)
class Failure:
    """One line of the picture: settings that paint it, which ControlNet, and which rows of which split."""

    name: str
    settings: dict
    controlnet: str = "shipped"  # or one of `controlnets`
    split: str = "test"
    without_text: bool = False


FAILURES = (
    Failure("not yet\nconverged", {}, "early"),
    Failure("mask\nignored", {"controlnet_conditioning_scale": 0.0}),
    Failure("text\nignored", {}, without_text=True),
    Failure("colour\nshift", {"guidance_scale": 7.5, "guidance_end": 1.0}),
    Failure("copied", {}, "copying", "train"),
)


def write_failures(out: Path, work: Path, dataset: Path, recipe: Recipe = Recipe()) -> Path:
    """Train what fails in `work`, where the same command goes on, paint every failure, and write the PNG `out`."""
    show.quiet()
    folders = controlnets(work, dataset, recipe)
    splits = {name: read_split(dataset, name) for name in ("train", "test")}
    settings = make(SampleConfig, "tiny", controlnet_model_name_or_path=folders["shipped"])
    healthy = load_painter(settings, splits["test"].palette)
    painters = {name: painter_with(healthy, folder) for name, folder in folders.items()}
    lines = [cells(failure, splits[failure.split], healthy, painters[failure.controlnet], settings)
             for failure in FAILURES]  # fmt: skip
    save_grid(figure(lines), out)
    print(f"Wrote {out}.")
    return out


def controlnets(work: Path, dataset: Path, recipe: Recipe) -> dict[str, str]:
    """Folders: the one shipped with the base, one stopped too early, and one that saw a few rows too often."""
    few: dict[str, Any]
    few = {"max_train_samples": recipe.copied_rows, "max_train_steps": recipe.copying_steps, "augment": "none"}
    kinds = {"early": {"max_train_samples": recipe.early_rows, "max_train_steps": recipe.early_steps}, "copying": few}
    for name, changes in kinds.items():
        shared = {"dataset_name": str(dataset), "cache_dir": str(work / "cache"), "output_dir": str(work / name)}
        train(make(TrainConfig, "tiny", resolution=128, cache_draws=1, **shared, **changes))
    return {"shipped": str(BASE / "controlnet")} | {name: str(work / name) for name in kinds}


def painter_with(painter: Painter, folder: str) -> Painter:
    """The same base with another ControlNet."""
    settings = SampleConfig(controlnet_model_name_or_path=folder)
    return dataclasses.replace(load_painter(settings, painter.palette), base=painter.base)


def cells(failure: Failure, split: Split, healthy: Painter, failing: Painter, settings: SampleConfig) -> list:
    """Of each example: mask, real image, painted as it should be and as it fails, uint8 [H, W, 3], and its caption."""
    wrong, told = dataclasses.replace(settings, **failure.settings), []
    for row in range(EXAMPLES):
        (image, mask), caption = show.read_pair(split, row), split[row].caption
        good = generate(healthy, mask[None], [caption], [row], settings)[0]
        bad = generate(failing, mask[None], ["" if failure.without_text else caption], [row], wrong)[0]
        told.append(((colourise(mask, split.palette), image, good, bad), caption))
    return told


def figure(lines: list) -> Figure:
    """A failure a row, its examples side by side."""
    pictures = [[picture for shown, _ in line for picture in shown] for line in lines]
    below = [[text for _, caption in line for text in ("", caption, "", "")] for line in lines]
    names = [failure.name for failure in FAILURES]
    return show.grid(pictures, HEADS * EXAMPLES, names, below, 1.28)
