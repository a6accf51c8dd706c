"""Promise: a base that cannot draw a data set's images, or read its captions, is named before any training."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from segcn.cli import check_dataset
from segcn.data.metadata import read_split
from segcn.evaluate import base_check
from segcn.evaluate.base_check import BASE_CHECK, check_base
from segcn.evaluate.config import CheckConfig
from segcn.models.base import load_base
from segcn.models.segmenter import SegmenterConfig, train_segmenter
from segcn.train.loop import train
from segcn.utils.paths import BASE


def test_the_embedded_base_fits_the_landscapes_and_a_random_one_does_not(landscapes, base, tmp_path):
    rows = read_split(landscapes, "train")
    quick = SegmenterConfig(steps=40, width=8, resolution=64, batch_size=4)
    segmenter = train_segmenter(rows, quick, tmp_path / "segmenter", str, "cpu")
    good, bad = (check_base(rows, one, 64, segmenter=segmenter) for one in (load_base(BASE), base))
    assert good.problems == [] and np.median(good.psnr) > 24 and good.miou[1] > 0.9 * good.miou[0]
    assert len(bad.problems) >= 2 and np.median(bad.psnr) < 20
    assert "NOT fit" in " ".join(bad.lines()) and "The base fits these images." in good.lines()


def test_psnr_and_color_shift_are_those_of_the_reconstructions(landscapes, base, monkeypatch):
    monkeypatch.setattr(base_check, "reconstruct", lambda vae, image: image + 0.1)
    found = check_base(read_split(landscapes, "test"), base, 64)
    assert 26 < np.median(found.psnr) < 27 and found.shift["delta_e"] > 1  # 10 log10(4 / 0.01) = 26


def test_cut_captions_and_classes_below_a_latent_cell_are_named(landscapes, base):
    split = read_split(landscapes, "test")
    long = split[0]._replace(captions=("a lake " * 60,))
    found = check_base(replace(split, records=(long, *split.records[1:])), base, 16)
    assert found.cut == ["a lake " * 60] and "sun" in found.tiny and "sky" not in found.tiny
    assert "1 captions are longer" in " ".join(found.lines()) and "sun (0." in " ".join(found.lines())


def test_a_training_begins_with_the_check_and_does_it_once(quick, tmp_path, capsys):
    config = quick(tmp_path / "run", max_train_steps=2)
    train(config)
    assert "Base check: reconstructions of 12 rows" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / BASE_CHECK) as image:
        assert image.width > 300
    train(replace(config, max_train_steps=3))
    assert "Base check" not in capsys.readouterr().out


def test_the_command_checks_held_out_rows_and_measures_a_training(
    landscapes, random_base, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("segcn.models.segmenter.OUTPUTS", tmp_path)
    monkeypatch.setattr(SegmenterConfig, "__init__", quick_segmenter(SegmenterConfig.__init__))
    check_dataset(CheckConfig(str(landscapes), str(random_base), 64, output_dir=str(tmp_path / "check")))
    said = capsys.readouterr().out
    assert "reconstructions of 6 rows" in said and "mIoU of a segmenter" in said and "s a step" in said
    assert (tmp_path / "check" / BASE_CHECK).is_file()


def quick_segmenter(init):
    def quick(self, **given):
        init(self, **given | {"steps": 2, "width": 8})

    return quick


def test_the_embedded_base_opens_in_plain_diffusers_without_extra_arguments():
    program = f"""
import sys
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
controlnet = ControlNetModel.from_pretrained("{BASE}/controlnet")
pipeline = StableDiffusionControlNetPipeline.from_pretrained("{BASE}", controlnet=controlnet)
image = Image.new("RGB", (128, 128), "green")
print(pipeline("a winter landscape", image=image, num_inference_steps=1).images[0].size, "segcn" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "(128, 128) False"
