"""`segcn app`: the panel alone, in the browser. voila serves notebook 08 with the settings of the command line."""

import asyncio
import json
import logging
import os
import re
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from segcn.data.metadata import find_splits, read_named_split
from segcn.generate.config import SampleConfig
from segcn.notebook.config import AppConfig
from segcn.notebook.widgets import Panel
from segcn.utils import progress
from segcn.utils.args import make, preset_of_base
from segcn.utils.paths import ROOT, from_root

NOTEBOOK = ROOT / "notebooks" / "08_app.ipynb"
OF_SERVER = {"port", "no_browser"}  # settings that are no parameters of the notebook
FOLDERS = ("dataset_name", "pretrained_model_name_or_path", "lora", "controlnet_model_name_or_path", "segmenter",
           "output_dir")  # fmt: skip
ENDING = 10.0  # s that the kernels get to end
FROM_OUTSIDE = re.compile(r'<link [^>]*href="https?://[^>]*>')  # in voila's page: icons, which it brings along, too


def open_app(**parameters: Any) -> Panel:
    """The panel over a data set's masks, those of test/ where it has one; the model is loaded while it is looked at.

    parameters: those of AppConfig that are not ""; relative paths start at the repository's root. UserError for a data
    set that cannot be read; what is wrong with the models is shown in the panel.
    """
    config = make(AppConfig, **{name: value for name, value in parameters.items() if value != ""})
    folders = {name: str(from_root(path)) for name in FOLDERS if (path := getattr(config, name))}
    dataset, base = folders["dataset_name"], folders["pretrained_model_name_or_path"]
    split = read_named_split(dataset, "test" if "test" in find_splits(dataset) else "train")
    settings = make(
        SampleConfig, preset_of_base(base), pretrained_model_name_or_path=base, lora=folders.get("lora"),
        controlnet_model_name_or_path=folders.get("controlnet_model_name_or_path"), fit=config.fit,
        resolution=config.resolution or None, mixed_precision=config.mixed_precision,
    )  # fmt: skip

    def models():
        from segcn.data.visualize import quiet
        from segcn.generate.pipeline import load_pipeline
        from segcn.models.segmenter import open_segmenter, shipped_segmenter

        quiet()
        pipeline = load_pipeline(settings, split.palette)
        if "segmenter" in folders:
            return pipeline, open_segmenter(folders["segmenter"], split.palette, config.resolution or 512, config.fit)
        return pipeline, shipped_segmenter(base, split.palette)

    panel = Panel(None, split, folders["output_dir"], settings)
    panel.add_class("segcn-app")
    panel.load(models)
    return panel


def serve(config: AppConfig) -> None:
    """Serve the panel until Ctrl+C, and print its address; each page in a browser has a kernel of its own."""
    from voila.app import Voila

    class App(Voila):
        """voila that says where it is in one line, and whose page asks no other host for anything."""

        template_paths: list[str]

        def setup_template_dirs(self) -> None:
            super().setup_template_dirs()
            page = "index.html.j2"
            found = next(path for path in map(Path, self.template_paths) if (path / page).is_file())
            (Path(folder) / page).write_text(FROM_OUTSIDE.sub("", (found / page).read_text()))
            self.template_paths = [folder, *self.template_paths]

        def launch_browser(self) -> None:
            progress.WAITING.set()
            loop = asyncio.get_event_loop()  # a handler of our own: some callbacks swallow KeyboardInterrupt
            signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(loop.stop))
            print(f"segcn app: {self.display_url}  (Ctrl+C ends it)", flush=True)
            if not config.no_browser:
                super().launch_browser()

        def stop(self) -> None:
            watchdog = threading.Timer(ENDING, os._exit, (0,))
            watchdog.daemon = True
            watchdog.start()
            super().stop()

    with TemporaryDirectory() as folder:
        notebook = Path(folder) / NOTEBOOK.name
        notebook.write_text(with_settings(NOTEBOOK, config))
        for name in ("tornado.general", "tornado.application"):  # of a ping that is longer than its interval
            logging.getLogger(name).setLevel(logging.ERROR)
        words = [str(notebook), "--Voila.log_level=ERROR", "--Voila.ip=127.0.0.1", f"--port={config.port}", "--token"]
        if os.name == "posix":
            words.append("--KernelManager.transport=ipc")  # files only the user can open, in place of open ports
        App.launch_instance([*words, "--VoilaConfiguration.show_tracebacks=True"])
    sys.stdout.flush()
    os._exit(0)  # a socket of a kernel that is gone could keep the interpreter waiting


def with_settings(notebook: Path, config: AppConfig) -> str:
    """A notebook with a config in place of its parameters; paths of a command line count from where it is given."""
    book = json.loads(notebook.read_text())
    cell = next(cell for cell in book["cells"] if "parameters" in cell["metadata"].get("tags", []))
    given = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in OF_SERVER}
    given |= {name: str(Path(given[name]).expanduser().absolute()) for name in FOLDERS if given[name]}
    cell["source"] = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    return json.dumps(book)
