"""What many tests share: a small data set of landscapes and a random base of three narrow networks."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the hub must fail
# One of two workers computes on one core, and so do the processes that it starts.
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import SegformerConfig
from xdist.scheduler import LoadScopeScheduling

from segcn.cli import run_command
from segcn.data.masks import read_mask, resize_mask
from segcn.data.metadata import finish_dataset, read_split, write_pair
from segcn.generate.config import GenerateConfig
from segcn.generate.pipeline import Pipeline
from segcn.generate.writer import generate_dataset
from segcn.models.base import load_base
from segcn.models.controlnet import make_controlnet
from segcn.samples.base_model.recipe import SMOKE, build_tokenizer, export_base
from segcn.samples.base_model.training import Denoiser, build_vae, standardize_latents
from segcn.samples.landscapes.scene import sample_landscapes, write_landscapes
from segcn.train.config import TrainConfig
from segcn.utils.args import make
from segcn.utils.io import one_at_a_time
from segcn.utils.paths import OUTPUTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
QUICK = {
    "resolution": 64, "train_batch_size": 2, "checkpointing_steps": 3, "logging_steps": 1, "max_train_steps": 6,
    "reward_weight": 0.0,
}  # fmt: skip
WORKER = "PYTEST_XDIST_WORKER" in os.environ
SLACK = float(os.environ.get("SEGCN_SLACK", 2 if WORKER else 1))  # times slower than on two idle cores
LONG = ["test_resume", "test_run_all", "test_generate_kills", "test_notebooks", "test_pages"]  # these come first


def pytest_xdist_auto_num_workers(config):
    """Two; for a single file none, as its tests share what they make, except for the commands of pages."""
    names = {Path(argument.partition("::")[0]).name for argument in config.args}
    return 0 if len(names) == 1 and names != {"test_pages.py"} and names.pop().endswith(".py") else 2


class Scheduling(LoadScopeScheduling):
    """A worker gets whole files, but of the pages one block of commands."""

    def _split_scope(self, nodeid):
        return nodeid if "test_pages.py" in nodeid else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """The longest files first, so that both workers end at about the same time."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def landscapes(tmp_path_factory):
    """Folder with train/ (12 rows) and test/ (6 rows), 64 x 64."""
    folder = tmp_path_factory.mktemp("data") / "landscapes"
    write_landscapes(folder, 12, resolution=64, test=6, workers=1)
    return folder


@pytest.fixture(scope="session")
def sample_set():
    """data/landscapes, drawn by one worker while the other waits."""
    with one_at_a_time(OUTPUTS / ".landscapes.lock"):
        return sample_landscapes()


@pytest.fixture(scope="session")
def mixed(landscapes, tmp_path_factory):
    """Folder with train/ (11 rows) and test/ (4 rows): two wide images, a tall and a square one, in turn."""
    folder = tmp_path_factory.mktemp("data") / "mixed"
    for name, count in (("train", 11), ("test", 4)):
        split, rows = read_split(landscapes, name), []
        for row, record in enumerate(split.records[:count]):
            size = [(60, 90), (60, 90), (90, 60), (64, 64)][row % 4]  # height, width
            rows.append((f"images/{row}.png", f"masks/{row}.png", record.caption))
            image = np.asarray(Image.open(record.image).resize(size[::-1]))
            mask = resize_mask(read_mask(record.mask, split.palette), size)
            write_pair(folder / name, rows[-1][:2], image, mask, split.palette)
        finish_dataset(folder / name, rows, split.palette)
    return folder


@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """A base in Stable Diffusion's layout with random weights: its images are noise, its code path is real."""
    vae = build_vae(SMOKE.vae).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    standardize_latents(vae, torch.from_numpy(pixels))
    tokenizer = build_tokenizer(["a winter landscape at dusk with a lake"] * 3)
    denoiser = Denoiser(SMOKE.unet, SMOKE.vae.latent_channels, tokenizer)
    return export_base(tmp_path_factory.mktemp("models") / "base", SMOKE, vae, tokenizer, denoiser)


@pytest.fixture(scope="module")
def toy(kind, tmp_path_factory):
    """The folder of a base of another family with a few random weights; kind: of the test file, sdxl or sd3."""
    folder = tmp_path_factory.mktemp("models") / kind
    run_command(["samples", kind, str(folder), "--toy"])
    return folder


@pytest.fixture(scope="module")
def six_steps(quick, toy):
    """A function from settings to the config of six quick steps on the toy."""
    return lambda out, **settings: quick(out, pretrained_model_name_or_path=str(toy), **settings)


@pytest.fixture
def segformer(tmp_path):
    """config.json alone of a SegFormer that learns in no time, with dropout as of B0."""
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    SegformerConfig(**sizes, decoder_hidden_size=16).save_pretrained(tmp_path / "segformer")
    return tmp_path / "segformer"


@pytest.fixture(scope="session")
def random_controlnet(random_base, tmp_path_factory):
    """The folder of a ControlNet that has learnt nothing."""
    folder = tmp_path_factory.mktemp("models") / "controlnet"
    make_controlnet(load_base(random_base).unet).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(random_base):
    """The random base, loaded once a test file."""
    return load_base(str(random_base))


@pytest.fixture(scope="module")
def pipeline(base, landscapes):
    """That base with a ControlNet that has learnt nothing."""
    return Pipeline(base, make_controlnet(base.unet).eval(), read_split(landscapes, "test").palette, "random")


@pytest.fixture
def config(random_base, landscapes, tmp_path):
    """The settings that generate an image for each of the six test masks in two steps; some files have their own."""
    given = {"pretrained_model_name_or_path": str(random_base), "controls": str(landscapes)}
    return make(GenerateConfig, "tiny", **given, output_dir=str(tmp_path / "out"), num_inference_steps=2, batch_size=4)


@pytest.fixture
def write(config, pipeline):
    """Generate with these changes of the settings; the folder."""
    return lambda log=print, **changes: generate_dataset(replace(config, **changes), pipeline, log)


@pytest.fixture(scope="module")
def warm():
    """Where processes that are killed start fast."""
    from kills import warm_context

    return warm_context()


@pytest.fixture(scope="session")
def quick(landscapes, random_base, tmp_path_factory):
    """A function from settings to the config of a run of six quick steps."""
    places = {"pretrained_model_name_or_path": str(random_base), "dataset_name": str(landscapes)}
    shared = QUICK | places | {"cache_dir": str(tmp_path_factory.mktemp("cache")), "lr_scheduler": "constant"}

    def config(output_dir, preset="tiny", **settings):
        return make(TrainConfig, preset, **shared | {"output_dir": str(output_dir)} | settings)

    return config


@pytest.fixture
def fresh_precision():
    """accelerate holds on to the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args):
    return {**browser_type_launch_args, "executable_path": CHROMIUM, "args": FLAGS}


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args):
    return {**browser_context_args, "viewport": {"width": 1400, "height": 1200}, "service_workers": "block"}
