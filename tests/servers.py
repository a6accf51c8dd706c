"""JupyterLab and voila on loopback, and Debian's Chromium to look at them; without it, what imports this is skipped."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import papermill
import pytest
from conftest import CHROMIUM

from segcn.utils.paths import ROOT

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


class Server:
    """JupyterLab or voila in a process and a home of its own."""

    def __init__(self, name, folder, notebooks):
        """notebooks: the parameters of each that is served, by its name."""
        self.folder, self.token, self.port = folder, secrets.token_hex(8), free_port()
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
        own = {name: str(self.folder / name.lower()) for name in
               ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME")}  # fmt: skip
        for path in own.values():
            os.makedirs(path, exist_ok=True)
        lab = {"JUPYTERLAB_SETTINGS_DIR": self.folder / "settings", "JUPYTERLAB_WORKSPACES_DIR": self.folder / "work"}
        return {**os.environ, **own, **{name: str(path) for name, path in lab.items()}}

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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
