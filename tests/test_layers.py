"""Promise: imports point downward, and the sample data are imported only from the top."""

import ast
from pathlib import Path

import segcn

PACKAGE = Path(segcn.__file__).parent
FLOORS = [
    {"errors", "devices", "frozen", "seeds", "home", "loss"},
    {"atomic", "captions", "progress", "geometry", "convergence", "sheets"},
    {"config", "files", "checkpoint", "metadata", "timed"},
    {"labels", "train_config"},
    {"masks"},
    {"records", "augment", "arguments", "schedule", "mask_painter"},
    {"dataset", "memory", "models", "distance", "scan", "survey", "tables", "balance", "finite", "rows"},
    {"bad_samples", "class_weights", "colour", "latent_files", "noise_prior", "sampling", "stamps"},
    {
        "latents",
        "ema",
        "trainable",
        "segmenter",
        "show",
        "findings",
        "pipeline",
        "ready",
        "sources",
        "bench_plan",
        "flops",
        "mask_picker",
        "panel_settings",
    },
    {"watch", "doctor", "palette", "placing", "evaluate", "dealing", "controls", "made_with"},
    {"bench_step", "claim", "best", "judge", "modelcard", "draws", "examples", "launch", "manifest", "by_hand"},
    {"feed", "vetting", "gallery"},
    {"prepare", "infer", "widgets", "summary", "quarantine", "importer", "bench"},
    {"validation", "page", "bench_faithful", "preflight", "saving", "export", "objective", "prompts", "datacard"},
    {"batches"},
    {"generate"},
    {"train", "charts", "samples", "report", "proof"},
    {"workspace", "story", "curves"},
    {"paint", "run", "bench_train", "bench_sides", "bench_scores"},
    {"bench_charts", "bench_peaks", "bench_verdicts"},
    {"bench_generate"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(path):
    """The rooms of ours that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "segcn":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segcn."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("segcn."))


def test_imports_point_downward():
    for path in PACKAGE.glob("*.py"):
        if path.stem != "__init__":
            upward = [name for name in imported(path) if FLOOR_OF[name] >= FLOOR_OF[path.stem]]
            assert not upward, f"{path.name} imports {upward}"


def test_sample_data_are_imported_only_from_the_top():
    users = {path.stem for path in PACKAGE.glob("*.py") if "samples" in set(imported(path))}
    assert users <= {"cli", "workspace"}


def test_samples_stand_on_the_package_below_them():
    for path in (PACKAGE / "samples").glob("*.py"):
        assert all(FLOOR_OF[name] <= FLOOR_OF["samples"] for name in imported(path)), path
