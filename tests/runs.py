"""What a run folder holds, for tests that compare runs."""

import json
from pathlib import Path


def weights(folder):
    """The bytes of the finished ControlNet."""
    return (Path(folder) / "diffusion_pytorch_model.safetensors").read_bytes()


def log_of(folder):
    """The entries of log.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("seconds_per_step", None)
        entry.get("faithfulness", {}).pop("seconds", None)
    return entries
