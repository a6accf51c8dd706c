"""Promise: each notebook runs by Run All in JupyterLab, in a real browser, with an image after its steps."""

import pytest
from servers import (
    OPENED,
    PATIENCE,
    RUN_ALL,
    Server,
)

pytestmark = pytest.mark.slow

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
}
PICTURES = {"00_embedded_base": 10, "01_inspect_data": 5, "02_paired_augmentation": 3, "03_train": 5, "04_generate": 3,
            "05_evaluate": 3, "06_benchmark": 1, "07_sweep": 2}  # fmt: skip
ENDED = """() => {
    const notebook = window.jupyterapp.shell.currentWidget;
    const cells = [...notebook.content.model.cells].filter((cell) => cell.type === "code");
    const told = cells.flatMap((cell) => cell.sharedModel.outputs.map((output) => output));
    const failed = told.filter((output) => output.output_type === "error");
    const idle = notebook.sessionContext.session?.kernel?.status === "idle";
    const done = idle && cells.every((cell) => cell.sharedModel.execution_count !== null);
    if (!done && !failed.length) return null;
    return {errors: failed.map((output) => `${output.ename}: ${output.evalue}`),
            stderr: told.filter((output) => output.name === "stderr").map((output) => String(output.text)),
            images: told.filter((output) => output.data && output.data["image/png"]).length};
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, landscapes, random_base):
    """A server with every notebook, on small data and a base whose images are noise."""
    folder = tmp_path_factory.mktemp("lab")
    common = {"pretrained_model_name_or_path": str(random_base), "output_dir": str(folder / "out")}
    data = {"dataset_name": str(landscapes)}
    without_data = ("00_embedded_base", "06_benchmark")
    notebooks = {name: common | ({} if name in without_data else data) | own for name, own in PARAMETERS.items()}
    server = Server("lab", folder, notebooks)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("notebook", PARAMETERS)
def test_it_runs_by_run_all_in_a_browser(notebook, lab, page, tmp_path):
    page.set_default_timeout(PATIENCE)
    page.goto(lab.lab_url(notebook), wait_until="commit")
    page.wait_for_function(OPENED)
    page.evaluate(RUN_ALL)
    found = page.wait_for_function(ENDED, timeout=PATIENCE, polling=500).json_value()
    page.screenshot(path=tmp_path / f"{notebook}.png")
    assert not found["errors"] and not found["stderr"]
    assert found["images"] >= PICTURES[notebook]
