"""What a folder holds, for tests that compare runs and generated sets; one process without a launcher."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from segcn.utils.io import LOCK

ALONE = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def tree(folder):
    """The bytes of every file but the lock."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != LOCK]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def weights(folder):
    """The bytes of the finished ControlNet."""
    return (Path(folder) / "diffusion_pytorch_model.safetensors").read_bytes()


def loud_controlnet(controlnet):
    """A ControlNet whose layers that begin at zero have a strong effect, the same each time."""
    random = torch.Generator().manual_seed(0)
    for name, weight in controlnet.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_blocks", "pos_embed_input")):
            weight.data += 0.3 * torch.randn(weight.shape, generator=random)
    return controlnet


def log_of(folder):
    """The entries of log.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("seconds_per_step", None)
        entry.get("faithfulness", {}).pop("seconds", None)
    return entries
