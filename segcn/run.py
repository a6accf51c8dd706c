"""`segcn run`: execute notebooks 01 to 05 in order with papermill, and say what came out."""

import json
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import papermill
from nbconvert import HTMLExporter
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from segcn.atomic import write_text
from segcn.config import OUTPUTS, PRECISIONS, flag
from segcn.errors import UserError
from segcn.metrics_table import table
from segcn.progress import clock
from segcn.workspace import NOTEBOOKS

PATHS = ("pretrained_model_name_or_path", "dataset_name", "output_dir", "controlnet_model_name_or_path", "clip",
         "inception_weights")  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Run notebooks 01 to 05: inspect, augment, train, generate, evaluate."""

    preset: str = flag("tiny", "tiny (embedded base, landscapes, ten minutes on two cores) or sd15", ("tiny", "sd15"))
    pretrained_model_name_or_path: str = flag("", "base model folder; none: the embedded base")
    dataset_name: str = flag("", "data set folder, or its metadata.csv; none: the sample landscapes")
    output_dir: str = flag("", "where everything goes; none: outputs/PRESET")
    resolution: int | None = flag(None, "pixels a side, of training and painting; none: 128, or 512 of sd15")
    fit: str | None = flag(None, "what makes a picture square: crop, pad or stretch; none: crop")
    augment: str | None = flag(None, "affine or none, and changes: affine,degrees=20,fill=cover; none: affine")
    class_balance: float | None = flag(None, "repeat rows with classes that fewer rows show than this share; none: 0")
    row: int | None = flag(None, "of notebook 02: which row to augment; none: 0")
    draws: int | None = flag(None, "of notebook 02: augmentations of it; none: 10")
    counted_rows: int | None = flag(None, "of notebook 02: rows in which to count classes; none: 200")
    max_train_steps: int | None = flag(None, "optimizer steps; none: 400, or one pass over the data of sd15")
    train_batch_size: int | None = flag(None, "rows a step; none: 16, or 4 of sd15")
    faithfulness_rows: int | None = flag(None, "held-out masks painted and scored while it trains; none: 12")
    num_processes: int | None = flag(None, "that train together; none: 1")
    more_flags: str = flag("", "more flags of segcn train, as one text")
    controlnet_model_name_or_path: str = flag("", "ControlNet to paint with; none: the one that notebook 03 trained")
    num_inference_steps: int | None = flag(None, "denoising steps; none: the preset's")
    guidance_scale: float | None = flag(None, "weight of the text; none: the preset's")
    controlnet_conditioning_scale: float | None = flag(None, "weight of the mask; none: the preset's")
    batch_size: int | None = flag(None, "pictures painted at once; none: 16")
    mixed_precision: str | None = flag(None, "of training and painting; none: no", PRECISIONS)
    limit: int | None = flag(None, "held-out masks to paint and score; none: 128")
    floor_limit: int | None = flag(None, "rows to paint without their mask; none: 48")
    segmenter_steps: int | None = flag(None, "training steps of the judge; none: its default")
    inception_weights: str = flag("", "file for FID and KID as published; none: torch.hub's, if there")
    clip: str = flag("", "folder of a CLIPModel, for CLIPScore; none: without")
    seed: int | None = flag(None, "of training and painting; none: 0")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    only: str = flag("", "a part of the notebooks, such as 03,04")


class SpokenEngine(NBClientEngine):
    """papermill's engine, which also says which cell it is at."""

    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, **settings):
        """Announce each code cell by the heading above it, then execute as ever."""
        total = sum(cell.cell_type == "code" for cell in manager.nb.cells)
        started, start = [], manager.cell_start

        def cell_start(cell, cell_index=None, **more):
            if cell.cell_type == "code":
                started.append(cell)
                print(f"  cell {len(started)}/{total}  {heading(manager.nb.cells, cell_index)}", flush=True)
            return start(cell, cell_index, **more)

        manager.cell_start = cell_start
        settings["extra_arguments"] = ["--log-level=ERROR"]  # of the kernel: no remarks on its transport
        return super().execute_managed_notebook(manager, kernel_name, **settings)


papermill_engines.register("spoken", SpokenEngine)


def run(config: RunConfig) -> Path:
    """Execute the chosen notebooks and return the run folder; UserError names the notebook and cell that failed."""
    config = from_here(config)
    out = Path(config.output_dir)
    chosen = choose(config.only)
    began = time.monotonic()
    for number, notebook in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {notebook.stem}  ({clock(time.monotonic() - began)})", flush=True)
        execute(notebook, out, parameters_for(notebook, config))
    summarise(out, time.monotonic() - began)
    return out


def from_here(config: RunConfig) -> RunConfig:
    """The config with absolute paths: those of a command line count from the folder it is given in."""
    paths = {name: getattr(config, name) for name in PATHS}
    absolute: dict[str, Any] = {name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if path}
    return replace(config, **{"output_dir": str(OUTPUTS / config.preset)} | absolute)


def choose(only: str) -> list[Path]:
    """The notebooks to run, by the numbers in `only` ("03,04"), or 01 to 05."""
    by_number = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    numbers = [part.strip().zfill(2) for part in only.split(",")] if only else ["01", "02", "03", "04", "05"]
    unknown = [number for number in numbers if number not in by_number]
    if unknown:
        raise UserError(f"--only {only}: no notebook {unknown[0]}; there are {', '.join(by_number)}")
    return [by_number[number] for number in numbers]


def parameters_for(notebook: Path, config: RunConfig) -> dict:
    """The settings that were given and that this notebook has in its parameters cell."""
    known = papermill.inspect_notebook(str(notebook))
    given = {name: value for name, value in vars(config).items() if value not in (None, "") and name != "only"}
    return {name: value for name, value in given.items() if name in known}


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Run one notebook; the executed copy and its HTML go to out/notebooks."""
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / notebook.name
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters,
            engine_name="spoken",
            progress_bar=False,
            stdout_file=sys.stdout,
            cwd=str(NOTEBOOKS),
        )
    except PapermillExecutionError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue))
        raise UserError(f"{notebook.name}, cell {error.cell_index}: {error.ename}: {reason}\nSee {executed}") from None
    finally:
        if executed.is_file():
            html, _ = HTMLExporter().from_filename(str(executed))
            write_text(executed.with_suffix(".html"), html)


def heading(cells: list, index: int) -> str:
    """The last heading or first words of the markdown above a cell."""
    for cell in reversed(cells[:index]):
        if cell.cell_type == "markdown":
            lines = [line.strip("# ").strip() for line in cell.source.splitlines() if line.strip()]
            return lines[0][:70] if lines else ""
    return "parameters"


def summarise(out: Path, seconds: float) -> None:
    """Print the metrics and the paths to open."""
    metrics = out / "metrics.json"
    if metrics.is_file():
        print("\n" + table(json.loads(metrics.read_text())))
    print(f"\nDone in {clock(seconds)}. Open:")
    for path in (out / "story.png", metrics, out / "controlnet", out / "generated", out / "notebooks"):
        if path.exists():
            print(f"  {path}")
