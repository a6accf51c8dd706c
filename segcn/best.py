"""The best checkpoint of a training: what the log says of its validations, and best.json, which names it."""

import json
from pathlib import Path

from segcn import checkpoint
from segcn.atomic import write_text
from segcn.watch import LOG, read_log

BEST = "best.json"


def scores(entries: list[dict]) -> dict[int, dict]:
    """The faithfulness that a log's entries tell, by step."""
    return {entry["step"]: entry["faithfulness"] for entry in entries if "faithfulness" in entry}


def fractions(entries: list[dict]) -> tuple[list[int], list[float]]:
    """The steps, and the faithfulness there as a share of the ceiling."""
    found = scores(entries)
    return list(found), [score["of_ceiling"] for score in found.values()]


def is_best(entries: list[dict]) -> bool:
    """Whether the last validation beats all before it."""
    *before, last = fractions(entries)[1]
    return last > max(before, default=-1.0)


def record_best(output_dir: Path) -> list[str]:
    """Write best.json for the best validation whose checkpoint stands; the checkpoint's name, to be kept.

    It follows from log.jsonl and the folders alone, so a resumed run has the one of a run that was never cut. The best
    until now goes, if it was saved for its score alone.
    """
    standing = checkpoint.steps(output_dir)
    found = {step: score for step, score in scores(read_log(output_dir / LOG)).items() if step in standing}
    if not found:
        (output_dir / BEST).unlink(missing_ok=True)
        return []
    step = max(found, key=lambda step: found[step]["of_ceiling"])
    name = standing[step].name
    old = read_best(output_dir)
    told = {"step": step, "checkpoint": name, "miou": found[step]["miou"], "of_ceiling": found[step]["of_ceiling"]}
    write_text(output_dir / BEST, json.dumps(told) + "\n")
    if old and old["step"] < step and old["step"] in standing and only_best(standing[old["step"]]):
        checkpoint.discard(standing[old["step"]])
    return [name]


def only_best(folder: Path) -> bool:
    """Whether a checkpoint was saved for its score alone."""
    return json.loads((folder / "state.json").read_text()).get("only_best", False)


def read_best(output_dir: str | Path) -> dict | None:
    """step, checkpoint, miou and of_ceiling of the best checkpoint; None where none was scored."""
    path = Path(output_dir) / BEST
    return json.loads(path.read_text()) if path.is_file() else None
