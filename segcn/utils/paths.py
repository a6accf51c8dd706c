"""Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one."""

import os
from pathlib import Path

# --- config: Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.
#
# Names are those of diffusers' train_controlnet.py and pipelines wherever these have one.

ROOT = Path(__file__).resolve().parents[2]  # the repository; every default path is below it
OUTPUTS = ROOT / "outputs"
BASE = ROOT / "data" / "base"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a ControlNet: written last, so it is whole where this stands
MAX_PIXELS = 89_478_485  # of an image: Pillow's limit, 256 MiB of RGB


# --- home: Caches of Matplotlib, Jupyter and Hugging Face in a folder that can be written, where the home folder cannot.

PLACES = {
    "MPLCONFIGDIR": "matplotlib",
    "JUPYTER_CONFIG_DIR": "jupyter/config",
    "JUPYTER_DATA_DIR": "jupyter/data",
    "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
    "IPYTHONDIR": "ipython",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
}


def use_writable_home(fallback: Path) -> None:
    """Point every cache that has no place of its own below `fallback` if the home folder is not writable."""
    home = Path.home()
    if os.access(home, os.W_OK):
        return
    for variable, name in PLACES.items():
        if variable not in os.environ:
            folder = fallback / name
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(folder)


# --- files: Which files of a data set may be opened: regular ones inside its folder, images of known formats and sane sizes.

SYMLINKS = "SEGCN_ALLOW_SYMLINKS"  # set by --allow_symlinks, inherited by processes and notebooks


# --- claim: A run folder belongs to one run: its settings stand there, and other settings or another run are refused.

RUN_FILE = "train_config.json"


# --- modelcard: The model card of a run, README.md in its folder: what it paints from, the data, the training and how good it is.


def public_name(path: str | Path) -> str:
    """A name on the hub as it is; of a folder its own name, without the folders above it."""
    local = Path(path).exists() or Path(path).is_absolute() or str(path).startswith((".", "~"))
    return Path(path).absolute().name if local else str(path)


# --- workspace: Where a notebook run keeps its things: one folder below outputs/, the same names in every notebook.


def from_root(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository's root."""
    return ROOT / Path(path).expanduser()
