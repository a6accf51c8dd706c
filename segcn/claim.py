"""A run folder belongs to one run: its settings stand there, and other settings or another run are refused."""

import json
from pathlib import Path

from segcn import checkpoint, models
from segcn.arguments import to_json
from segcn.errors import UserError
from segcn.records import Split
from segcn.train_config import TrainConfig, differences
from segcn.watch import Log

RUN_FILE = "train_config.json"


def claim(output_dir: Path, config: TrainConfig, split: Split, base: models.Base, accelerator, log: Log) -> None:
    """Write the resolved config to the run folder, or hold it against the one that stands there."""
    resolved = json.loads(to_json(config)) | {
        "data_fingerprint": split.fingerprint,
        "base_fingerprint": base.fingerprint,
        "palette_fingerprint": split.palette.fingerprint,
        "processes": accelerator.num_processes,
    }
    path = output_dir / RUN_FILE
    if path.is_file():
        changed = differences(json.loads(path.read_text()), resolved)
        if changed and not config.allow_changes:
            listed = "\n  ".join(changed)
            raise UserError(
                f"{output_dir} holds a run with other settings:\n  {listed}\n"
                "Choose another --output_dir, or go on with these by --allow_changes."
            )
        for line in changed:
            log.say(f"Changed: {line}")
    elif output_dir.exists() and any(entry.name != config.logging_dir for entry in output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty and holds no run of segcn: choose another --output_dir.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(resolved, indent=1) + "\n")
        split.palette.save(output_dir / "palette.json")
