"""Caches of Matplotlib, Jupyter and Hugging Face in a folder that can be written, where the home folder cannot."""

import os
from pathlib import Path

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
