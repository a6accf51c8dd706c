"""Promise: what a person sees and does in Debian's Chromium: every notebook by Run All, the panel in Lab and voila."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import papermill
import pytest
from conftest import CHROMIUM
from PIL import Image

from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.generate.infer import read_settings
from segcn.utils.paths import BASE, ROOT

if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)
pytest.importorskip("pytest_playwright", reason="no pytest-playwright here: pip install -e '.[test]'")
expect = pytest.importorskip("playwright.sync_api").expect

LAB = [
    "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--LabApp.expose_app_in_browser=True",
    "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly", "--ServerApp.root_dir=.",
]  # fmt: skip
VOILA = ["voila", "04_generate.ipynb", "--no-browser", "--Voila.ip=127.0.0.1"]
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PATIENCE = 300_000  # ms for a kernel to start and to run the notebook
RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const notebook = app.shell.currentWidget;
    await notebook.context.ready;
    await notebook.sessionContext.ready;
    app.commands.execute("notebook:run-all-cells");
}"""
OPENED = "window.jupyterapp?.shell?.currentWidget?.context"

PROMPT = 'a winter landscape at dusk <img src=x onerror="window.heard = 1"> & a house'
HOUSE = 8
BROKEN = "<img src=x onerror=window.heard=1>.png"
# What makes each of them quick; all else is as a person finds it.
PARAMETERS = {
    "00_embedded_base": {"steps": 2, "num_inference_steps": 2},
    "01_inspect_data": {},
    "02_paired_augmentation": {"resolution": 64},
    "03_train": {"max_train_steps": 4, "train_batch_size": 2, "resolution": 64, "faithfulness_rows": 0},
    "04_generate": {"limit": 4, "num_inference_steps": 2},
    "05_evaluate": {"limit": 4, "floor_limit": 1, "segmenter_steps": 3},
    "06_benchmark": {"measured_steps": 2, "max_train_samples": 8},
    "07_sweep": {"guidance_scales": "2", "controlnet_conditioning_scales": "0.5,1", "limit": 2, "segmenter_steps": 3},
    "08_app": {},
}
IMAGES = {"00_embedded_base": 10, "01_inspect_data": 5, "02_paired_augmentation": 3, "03_train": 5, "04_generate": 3,
          "05_evaluate": 3, "06_benchmark": 1, "07_sweep": 2, "08_app": 0}  # fmt: skip
ENDED = """() => {
    const notebook = window.jupyterapp.shell.currentWidget;
    const cells = [...notebook.content.model.cells].filter((cell) => cell.type === "code");
    const outputs = cells.flatMap((cell) => cell.sharedModel.outputs.map((output) => output));
    const failed = outputs.filter((output) => output.output_type === "error");
    const idle = notebook.sessionContext.session?.kernel?.status === "idle";
    const done = idle && cells.every((cell) => cell.sharedModel.execution_count !== null);
    if (!done && !failed.length) return null;
    return {errors: failed.map((output) => `${output.ename}: ${output.evalue}`),
            stderr: outputs.filter((output) => output.name === "stderr").map((output) => String(output.text)),
            images: outputs.filter((output) => output.data && output.data["image/png"]).length};
}"""


class Server:
    """JupyterLab or voila in a process and a home of its own."""

    def __init__(self, name, folder, notebooks):
        """notebooks: the parameters of each that is served, by its name."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.token = folder, secrets.token_hex(8)
        for notebook, parameters in notebooks.items():
            papermill.execute_notebook(
                str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(folder / f"{notebook}.ipynb"), parameters,
                prepare_only=True, progress_bar=False,
            )  # fmt: skip
        for setting, values in LAB_SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{setting}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        flags = [f"--ServerApp.port={self.port}", f"--IdentityProvider.token={self.token}"]
        command = [*LAB, *flags] if name == "lab" else [*VOILA, f"--port={self.port}", f"--token={self.token}"]
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}/?token={self.token}"  # voila's only page

    def lab_url(self, notebook):
        return self.url.replace("/?", f"/lab/tree/{notebook}.ipynb?") + "&reset"

    def environment(self):
        places = {name: str(self.folder / name.lower()) for name in
                  ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME",
                   "JUPYTERLAB_WORKSPACES_DIR")}  # fmt: skip
        for path in places.values():
            os.makedirs(path, exist_ok=True)
        return {**os.environ, **places, "JUPYTERLAB_SETTINGS_DIR": str(self.folder / "settings")}

    def wait(self):
        """Until it answers."""
        until = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/static/nothing", timeout=5)
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, landscapes, random_base, sample_set):
    """A server with every notebook, on small data and a base whose images are noise."""
    folder = tmp_path_factory.mktemp("lab")
    common = {"pretrained_model_name_or_path": str(random_base), "output_dir": str(folder / "out")}
    own = {name: {"dataset_name": str(landscapes)} for name in PARAMETERS if name[:2] not in ("00", "06")}
    notebooks = {name: common | own.get(name, {}) | toy for name, toy in PARAMETERS.items()}
    server = Server("lab", folder, notebooks)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", PARAMETERS)
def test_it_runs_by_run_all_in_a_browser(notebook, lab, page, tmp_path):
    page.set_default_timeout(PATIENCE)
    page.goto(lab.lab_url(notebook), wait_until="commit")
    page.wait_for_function(OPENED)
    page.evaluate(RUN_ALL)
    found = page.wait_for_function(ENDED, timeout=PATIENCE, polling=500).json_value()
    page.screenshot(path=tmp_path / f"{notebook}.png")
    assert not found["errors"] and not found["stderr"]
    assert found["images"] >= IMAGES[notebook]


@pytest.fixture(scope="module")
def places(tmp_path_factory, landscapes):
    """Two servers on loopback, each with its own copy of the notebook; both kernels are started at once."""
    servers = {}
    try:
        for name in ("lab", "voila"):
            folder = tmp_path_factory.mktemp(name)
            parameters = {"dataset_name": str(landscapes), "output_dir": str(folder / "out"), "limit": 1,
                          "num_inference_steps": 2, "pretrained_model_name_or_path": str(BASE)}  # fmt: skip
            servers[name] = Server(name, folder, {"04_generate": parameters})
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="module")
def pages(places, browser, browser_context_args):
    """Both pages, opened together: the notebooks run side by side."""
    opened = {}
    for name, server in places.items():
        server.wait()
        opened[name] = browser.new_context(**browser_context_args).new_page()
        opened[name].set_default_timeout(PATIENCE)
        url = server.lab_url("04_generate") if name == "lab" else server.url
        opened[name].goto(url, wait_until="commit")
    lab = opened["lab"]
    lab.wait_for_function(OPENED)
    lab.evaluate(RUN_ALL)
    yield opened
    for page in opened.values():
        page.context.close()


class Person:
    """Someone in front of the panel."""

    def __init__(self, page, shots):
        self.page, self.shots, self.panel = page, shots, page.locator(".segcn-panel")
        self.canvas, self.status = page.locator(".segcn-paper"), page.locator(".segcn-status")
        self.page.locator("canvas.segcn-canvas[data-ready]").wait_for()
        self.page.set_default_timeout(PATIENCE)

    def press(self, name):
        self.panel.get_by_role("button", name=name, exact=True).click()

    def draw(self, *points):
        """Draw a line through points given as shares of the canvas's width and height, once the page lies still."""
        self.canvas.scroll_into_view_if_needed()
        before, box = None, self.canvas.bounding_box()
        while box != before:  # JupyterLab scrolls to the cell that was clicked
            self.page.wait_for_timeout(200)
            before, box = box, self.canvas.bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=8)
        self.page.mouse.up()

    def write(self, prompt):
        self.panel.locator("textarea").fill(prompt)

    def set(self, name, value):
        """Type a number, and leave the field only for the next button."""
        field = self.panel.locator(".widget-inline-hbox", has=self.page.get_by_text(name, exact=True))
        field.locator("input").fill(str(value))

    def sees(self, text, within=PATIENCE):
        expect(self.status).to_contain_text(re.compile(text), timeout=within)

    def images(self):
        """The width of every generated image that the browser has decoded."""
        found = self.panel.locator(".segcn-grid img")
        return [image.evaluate("image => image.decode().then(() => image.naturalWidth)") for image in found.all()]

    def shoot(self, name):
        self.panel.screenshot(path=self.shots / f"{name}.png")
        self.page.screenshot(path=self.shots / f"{name}_page.png")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["lab", "voila"])
def test_a_person_draws_a_mask_writes_a_prompt_and_keeps_what_comes_out(place, pages, places, tmp_path):
    person, server = Person(pages[place], tmp_path), places[place]
    before = len(read_split(server.folder / "out" / "saved"))  # the notebook itself saves a row
    person.shoot("opened")

    person.panel.locator("button.segcn-class", has_text="house").click()
    person.write(PROMPT)
    person.draw((0.3, 0.7), (0.6, 0.7))
    person.press("Generate")  # at once: the stroke must not come later
    person.sees(r"Generated 1 of 1")
    assert person.images() == [128]
    person.shoot("drawn")

    person.set("steps", 1000)
    person.press("Generate")
    person.sees(r"step [1-9]\d* of 1000")
    person.draw((0.3, 0.2), (0.6, 0.2))  # while the kernel is at work
    person.press("Stop")
    person.sees("Stopped; 0 of 1 generated, and one as far as it was")
    person.press("Back")
    assert person.images() == [128]  # the first one is still there

    person.press("Save")
    person.sees(f"Saved as row {before} of ")
    person.set("steps", 2)
    person.press("Same mask, four captions")
    person.sees("Generated 4 of 4")
    assert person.images() == [128] * 4
    person.panel.locator("select[title=view]").select_option("outlines")
    person.press("Save all")
    person.sees(f"Saved as row {before + 4} of ")
    person.shoot("four")
    first, *_, last = read_split(server.folder / "out" / "saved").records[before:]
    check_saved(read_split(server.folder / "out" / "saved"), first, last)
    upload_a_broken_mask(person, tmp_path)
    person.shoot("failed")
    assert person.page.evaluate("window.heard") is None
    assert_nothing_is_cut_off(person)


def check_saved(split, first, last):
    """The first image's mask has the first stroke, the last one's both; caption and settings are as given."""
    masks = [read_mask(record.mask, split.palette) for record in (first, last)]
    lower = [mask[87:92, 42:74] == HOUSE for mask in masks]
    upper = [mask[23:28, 42:74] == HOUSE for mask in masks]
    assert lower[0].all() and not upper[0].any() and lower[1].all() and upper[1].all()
    assert first.caption == PROMPT
    record = read_settings(first.image)
    assert record["prompt"] == [PROMPT] and record["settings"]["num_inference_steps"] == 2
    images = [np.asarray(Image.open(record.image)) for record in (first, last)]
    assert images[0].shape == (128, 128, 3) and images[0].std() > 5 and (images[0] != images[1]).any()


def upload_a_broken_mask(person, folder):
    (folder / BROKEN).write_bytes(b"")
    with person.page.expect_file_chooser() as chooser:
        person.panel.get_by_role("button", name=re.compile("Import")).click()
    chooser.value.set_files(folder / BROKEN)
    person.sees(re.escape(f"Error: {BROKEN}: the mask cannot be read"))


def assert_nothing_is_cut_off(person):
    """No part of the panel reaches beyond it or the page, and no text but a caption in a list is shortened."""
    cut = person.panel.evaluate("""panel => {
        const edge = Math.min(panel.getBoundingClientRect().right, document.documentElement.clientWidth) + 1;
        const parts = [...panel.querySelectorAll("*")].filter((part) => part.getClientRects().length);
        return parts.filter((part) => part.getBoundingClientRect().right > edge
            || (part.matches("button, .widget-label") && part.scrollWidth > part.clientWidth + 1))
            .map((part) => part.outerHTML.slice(0, 120));
    }""")
    assert not cut, cut
