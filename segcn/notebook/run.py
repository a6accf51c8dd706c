"""`segcn run`: execute notebooks 01 to 05 in order with papermill, and say what came out."""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import papermill
from nbconvert import HTMLExporter
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from segcn.evaluate.tables import table
from segcn.notebook.config import RunConfig
from segcn.notebook.workspace import NOTEBOOKS
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import OUTPUTS
from segcn.utils.progress import clock

PATHS = ("pretrained_model_name_or_path", "dataset_name", "output_dir", "controlnet_model_name_or_path", "clip",
         "inception_weights")  # fmt: skip


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
        if error.ename == UserError.__name__:
            raise UserError(f"{notebook.name}: {reason}") from None
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
