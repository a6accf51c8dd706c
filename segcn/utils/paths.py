"""Folders and file names that all commands share, and a place for caches where the home folder is read-only."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository; every default path is below it
OUTPUTS = ROOT / "outputs"
BASE = ROOT / "data" / "base"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a ControlNet: written last, so the folder is complete with it
LIGHT_WEIGHTS = "adapter_model.safetensors"  # of a light one, likewise
RUN_FILE = "train_config.json"  # the settings of a training, in its run folder
MAX_PIXELS = 89_478_485  # of an image: Pillow's limit, 256 MiB of RGB
SYMLINKS = "SEGCN_ALLOW_SYMLINKS"  # set by --allow_symlinks, inherited by processes and notebooks
CACHES = {  # environment variable: folder below outputs/.home
    "MPLCONFIGDIR": "matplotlib",
    "JUPYTER_CONFIG_DIR": "jupyter/config",
    "JUPYTER_DATA_DIR": "jupyter/data",
    "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
    "IPYTHONDIR": "ipython",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
}


def use_writable_home(fallback: Path) -> None:
    """Where the home folder is not writable, put every cache without a folder of its own below `fallback`."""
    if os.access(Path.home(), os.W_OK):
        return
    for variable, name in CACHES.items():
        if variable not in os.environ:
            folder = fallback / name
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(folder)


def public_name(path: str | Path) -> str:
    """A name on the hub as it is; of a folder its own name, without the folders above it."""
    local = Path(path).exists() or Path(path).is_absolute() or str(path).startswith((".", "~"))
    return Path(path).absolute().name if local else str(path)


def from_root(path: str | Path) -> Path:
    """An absolute path; a relative one starts at the repository's root."""
    return ROOT / Path(path).expanduser()
