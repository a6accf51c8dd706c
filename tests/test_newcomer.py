"""Promise: what README and data/README.md tell a newcomer to type works, and nothing secret ends up in a file."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from segcn import cli
from segcn.config import ROOT
from segcn.errors import UserError
from segcn.labels import Label, Palette
from segcn.latent_files import Layout
from segcn.masks import write_mask
from segcn.notebook import check_cells
from segcn.records import read_split
from segcn.run import RunConfig
from segcn.samples import failures
from segcn.segmenter import SegmenterConfig, train_segmenter
from segcn.train_config import TrainConfig

PAGES = ("README.md", "data/README.md")
SECRETS = {name: f"canary-{name.lower()}-5150" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
TOY = {  # what makes each step of the walk quick; everything else is as the page says
    "train": "--resolution 64 --max_train_steps 2 --faithfulness_rows 0 --report_to none --train_batch_size 2",
    "generate": "--resolution 64 --num_inference_steps 2 --limit 2 --min_miou 0 --segmenter judge",
    "evaluate": "--segmenter judge",
    "evaluate utility": "--resolution 64 --controlnet_steps 1 --num_inference_steps 2 --segmenter_steps 2 --images 4"
    " --fractions 1 --ratios 1 --seeds 2 --segmenter_width 8 --min_miou 0 --resamples 50",
}


def commands(page):
    """The lines of a page's blocks, with lines that go on joined and comments cut."""
    for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(segcn|accelerate|torchrun|python -m) ", line):
                yield shlex.split(line, comments=True)


def ours(words):
    """The words behind `segcn` of a line, whatever starts it; none where it starts something else."""
    for start in (["segcn"], ["-m", "segcn.cli"]):
        if words[: len(start)] == start:
            return words[len(start) :]
    for module in ("segcn.train", "segcn.generate"):
        if module in words:
            return [module.split(".")[1], *words[words.index(module) + 1 :]]
    return []


ALL = [(page, words) for page in PAGES for words in map(ours, commands(page)) if words]


class Parsed(Exception):
    """The command line was read to its end."""


@pytest.mark.parametrize(
    ("told_in", "words"), ALL, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_every_flag_that_a_page_shows_is_one_of_its_command(told_in, words, monkeypatch):
    def stop(*_, **__):
        raise Parsed

    def read(kind, arguments, program, parse=cli.parse):
        parse(kind, arguments, program)
        raise Parsed

    for place in ("segcn.cli.parse", "segcn.generate.parse", "segcn.utility.parse", "segcn.samples_cli.parse"):
        monkeypatch.setattr(place, read)
    for place in ("samples.landscapes.write_landscapes", "samples.earth.write_earth", "samples.sd15.build_sd15",
                  "samples.failures.write_failures", "workspace.sample_landscapes", "compare.compare"):  # fmt: skip
        monkeypatch.setattr(f"segcn.{place}", stop)
    assert words[0] in cli.COMMANDS
    with pytest.raises(Parsed):
        getattr(cli, f"do_{words[0]}")([word for word in words[1:] if word != "..."])


@pytest.fixture(scope="module")
def walked(tmp_path_factory, random_base):
    """A folder of pictures and masks, and what the walk of data/README.md made of it, with secrets around."""
    folder = tmp_path_factory.mktemp("walk")
    palette = Palette(
        (Label(0, "ground", (200, 160, 90)), Label(1, "tree", (0, 99, 0)), Label(2, "water", (0, 0, 200)))
    )
    for name in ("images", "masks"):
        (folder / "photos" / name).mkdir(parents=True)
    for k in range(72):
        mask = np.random.default_rng(k).integers(0, 3, (4, 4), np.uint8).repeat(16, 0).repeat(16, 1)
        noise = np.random.default_rng(k).integers(0, 40, (64, 64, 3), np.uint8)
        Image.fromarray(palette.table[mask] // 2 + noise).save(folder / "photos" / "images" / f"{k}.png")
        write_mask(folder / "photos" / "masks" / f"{k}.png", mask, palette)
    environment = os.environ | SECRETS | {"MODEL_DIR": str(random_base), "CUDA_VISIBLE_DEVICES": ""}
    page = (ROOT / "data" / "README.md").read_text()
    walk = re.search(r"^```\n(segcn palette photos/masks.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    for line in walk.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        kind = " ".join(words[1:3]) if words[2] == "utility" else words[1]
        if kind == "train":
            settings = SegmenterConfig(steps=3, batch_size=2, width=8, resolution=64)
            train_segmenter(read_split(folder / "pairs", "train"), settings, folder / "judge", lambda line: None)
        typed = f"{line} {TOY.get(kind, '')}".replace("segcn ", f"{sys.executable} -m segcn.cli ", 1)
        done = subprocess.run(["bash", "-c", typed], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
    return folder


@pytest.mark.slow
def test_the_walk_from_a_folder_ends_with_a_measured_set_and_a_study(walked):
    assert [len(read_split(walked / "pairs", name)) for name in ("train", "test")] == [8, 64]
    assert all(row.caption.startswith("a photo of ") for row in read_split(walked / "pairs", "train").records)
    out = walked / "outputs" / "pairs"
    assert len(read_split(out / "synthetic")) == 4
    assert all((out / name).is_file() for name in ("report.html", "metrics.json", "utility/utility.png"))


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_any_file(walked):
    seen = 0
    for path in walked.rglob("*"):
        if path.is_file():
            content, seen = path.read_bytes(), seen + 1
            assert not any(secret.encode() in content for secret in SECRETS.values()), path
    assert seen > 100


def test_a_draw_of_the_cache_has_the_size_that_the_page_tells():
    layout = Layout(50_000, (4, 64, 64), 512, (77, 768))
    told = f"{layout.entry.itemsize / 1e6:.2f} MB a row at 512 pixels, {layout.draw_bytes / 1e9:.0f} GB in all"
    assert told in (ROOT / "data" / "README.md").read_text()
    assert "(`--cache_budget_gb`, 20 by default)" in (ROOT / "data" / "README.md").read_text()
    assert TrainConfig.cache_budget_gb == 20


def test_unknown_parameters_and_wrong_types_are_refused_by_name():
    cell = (
        'limit: int = 128  # rows\nscale: float = 0.0  # weight\nname: str = ""  # text\nfast: bool = False  # or not'
    )
    check_cells([cell])
    check_cells([cell, "# Parameters\nlimit = 3\nscale = 2\nname = 'a'\nfast = True\n"])
    check_cells([cell, "import os"])
    for given, message in (
        ("limits = 3", "unknown parameter limits; this notebook has limit, scale, name, fast"),
        ("limit = 'three'", "parameter limit: expected int, found 'three'"),
        ("limit = True", "parameter limit: expected int, found True"),
        ("name = 2", "parameter name: expected str, found 2; papermill takes texts as they are by -r name"),
        ("fast = 1", "parameter fast: expected bool, found 1"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            check_cells([cell, f"# Parameters\n{given}\n"])


def test_papermill_stops_at_an_unknown_parameter(tmp_path):
    with pytest.raises(PapermillExecutionError, match="unknown parameter limits"):
        papermill.execute_notebook(
            str(ROOT / "notebooks" / "01_inspect_data.ipynb"), str(tmp_path / "out.ipynb"), {"limits": 3},
            progress_bar=False, cwd=str(tmp_path), kernel_name="python3",
        )  # fmt: skip


def test_segcn_run_takes_the_parameters_of_the_five_notebooks_and_no_others(capsys):
    names = set()
    for number in range(1, 6):
        path = next((ROOT / "notebooks").glob(f"0{number}_*.ipynb"))
        names |= set(papermill.inspect_notebook(str(path)))
    assert set(RunConfig.__dataclass_fields__) == names | {"only", "allow_symlinks"}
    with pytest.raises(UserError, match="unknown '--max_train_stepz'"):
        cli.do_run(["--max_train_stepz", "3"])
    with pytest.raises(SystemExit):
        cli.do_run(["--limit", "three"])
    assert "--limit: invalid int value: 'three'" in capsys.readouterr().err


@pytest.mark.slow
def test_every_failure_is_painted_beside_the_picture_as_it_should_be(tmp_path, landscapes):
    recipe = failures.Recipe(early_steps=1, early_rows=4, copying_steps=1, copied_rows=2)
    out = failures.write_failures(tmp_path / "failures.png", tmp_path / "work", landscapes, recipe)
    assert Image.open(out).width > 1000 and np.asarray(Image.open(out)).std() > 20
