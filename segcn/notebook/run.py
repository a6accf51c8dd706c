"""`segcn run`: execute notebooks 01 to 05 in order with papermill, and print the results."""

import base64
import json
import os
import re
import sys
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from segcn.evaluate.report import metrics_table
from segcn.notebook.config import RunConfig
from segcn.notebook.workspace import NOTEBOOKS
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import OUTPUTS, ROOT
from segcn.utils.progress import clock

PATHS = ("pretrained_model_name_or_path", "dataset_name", "output_dir", "controlnet_model_name_or_path", "clip",
         "inception_weights")  # fmt: skip

STILL = ROOT / "data" / "app.png"
NEEDS_KERNEL = "Here is a panel to work with: it needs a running kernel, so open the notebook in JupyterLab."
OFFLINE = """{% extends "index.html.j2" %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
"""  # nbconvert's page without what it would load: no notebook has formulas, and no widget lives without a kernel


class AnnouncingEngine(NBClientEngine):
    """papermill's engine, which also prints which cell it is at."""

    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, **settings):
        """Print the heading above each code cell, then execute it as usual."""
        cells, start = manager.nb.cells, manager.cell_start
        numbers = {id(cell): number for number, cell in enumerate((c for c in cells if c.cell_type == "code"), 1)}

        def cell_start(cell, cell_index=None, **more):
            if id(cell) in numbers:
                print(f"  cell {numbers[id(cell)]}/{len(numbers)}  {heading(cells, cell_index)}", flush=True)
            return start(cell, cell_index, **more)

        manager.cell_start = cell_start
        settings["extra_arguments"] = ["--log-level=ERROR"]  # of the kernel: no remarks on its transport
        return super().execute_managed_notebook(manager, kernel_name, **settings)


papermill_engines.register("announcing", AnnouncingEngine)


def run(config: RunConfig) -> Path:
    """Execute the chosen notebooks and return the run folder; UserError names the notebook that failed."""
    chosen, began = choose(config.only), time.monotonic()
    config = from_here(config)
    out = Path(config.output_dir)
    if not sys.stdout.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # of the kernels: lines in place of bars
    for number, notebook in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {notebook.stem}  ({clock(time.monotonic() - began)})", flush=True)
        execute(notebook, out, parameters_for(notebook, config))
    if (out / "metrics.json").is_file():
        print("\n" + metrics_table(json.loads((out / "metrics.json").read_text())))
    print(f"\nDone in {clock(time.monotonic() - began)}. Open:")
    for path in (
        out / name for name in ("report.html", "story.png", "metrics.json", "controlnet", "generated", "notebooks")
    ):
        if path.exists():
            print(f"  {path}")
    return out


def from_here(config: RunConfig) -> RunConfig:
    """The config with absolute paths: those of a command line count from the folder it is given in."""
    paths: dict[str, Any] = {name: getattr(config, name) for name in PATHS}
    absolute: dict[str, Any] = {"output_dir": str(OUTPUTS / config.preset)}
    absolute |= {name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if path}
    return replace(config, **absolute)


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
    values = vars(config).items()  # 0 is a value, but equal to False
    given = {name: value for name, value in values if not (value is None or value is False or value == "")}
    return {name: value for name, value in given.items() if name in known and name != "only"}


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Run one notebook; the executed copy and its HTML go to out/notebooks."""
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / notebook.name
    try:
        papermill.execute_notebook(
            str(notebook), str(executed), parameters, engine_name="announcing", progress_bar=False,
            stdout_file=sys.stdout, cwd=str(NOTEBOOKS),
        )  # fmt: skip
    except PapermillExecutionError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue))
        if error.ename == UserError.__name__:
            raise UserError(f"{notebook.name}: {reason}") from None
        raise UserError(f"{notebook.name}, cell {error.cell_index}: {error.ename}: {reason}\nSee {executed}") from None
    finally:
        if executed.is_file():
            write_text(executed.with_suffix(".html"), offline_page(nbformat.read(executed, as_version=4)))


def offline_page(book: nbformat.NotebookNode) -> str:
    """An executed notebook as HTML that loads nothing from elsewhere; the text above an image says what it shows.

    A widget, which needs a running kernel, is shown as a still of the panel, or as a sentence where there is none.
    """
    for index, cell in enumerate(book.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                output.data = {"text/html": _image(data["image/png"], heading(book.cells, index))}
            elif "application/vnd.jupyter.widget-view+json" in data:
                output.data = {"text/html": f"<p><em>{NEEDS_KERNEL}</em></p>"}
                if STILL.is_file():
                    still = base64.b64encode(STILL.read_bytes()).decode()
                    output.data["text/html"] += _image(still, "the panel, as it looks in JupyterLab")
    book.metadata.pop("widgets", None)
    exporter = HTMLExporter(extra_loaders=[DictLoader({"offline.html.j2": OFFLINE})], template_file="offline.html.j2")
    return exporter.from_notebook_node(book)[0]


def _image(png: str, about: str) -> str:
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{png.strip()}">'


def heading(cells: list, index: int) -> str:
    """The last heading or first words of the markdown above a cell."""
    for cell in reversed(cells[:index]):
        if cell.cell_type == "markdown":
            lines = [line.strip("# ").replace("**", "").strip() for line in cell.source.splitlines() if line.strip()]
            return lines[0][:70] if lines else ""
    return "parameters"
