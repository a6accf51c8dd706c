"""Promise: windows make one image of a mask larger than the network: of any size, without seams, in little memory."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tree
from torch.nn.functional import max_pool2d

from segcn.data.dataset import to_image
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split
from segcn.data.transforms import window_starts
from segcn.evaluate.metrics import boundary_counts, boundary_f, confusion_matrix, iou
from segcn.generate.config import InferConfig, SampleConfig
from segcn.generate.infer import infer
from segcn.generate.pipeline import Pipeline, generate, load_pipeline
from segcn.generate.tiling import OVERLAP, Windows
from segcn.generate.writer import generate_dataset
from segcn.models.controlnet import make_controlnet
from segcn.models.segmenter import predict, shipped_segmenter
from segcn.samples.landscapes.scene import draw_landscape, palette
from segcn.train.memory import peak_bytes, reset_peak
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.io import Process
from segcn.utils.paths import BASE

CPU = torch.device("cpu")
SETTINGS = SampleConfig(num_inference_steps=2, resolution=32, tiled=True)


@pytest.fixture(scope="module")
def pipeline(base):
    """A pipeline whose ControlNet has an effect."""
    controlnet = make_controlnet(base.unet).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        block.weight.data += 0.3
    controlnet.controlnet_cond_embedding.conv_out.weight.data += 0.3
    return Pipeline(base, controlnet, palette(), "random")


@pytest.fixture(scope="module")
def mask():
    """58 x 100 pixels: 8 x 13 cells, of which the last ones hold a part of a cell."""
    return np.ascontiguousarray(draw_landscape(0, 0, 100).mask[20:78])


@pytest.fixture
def made(pipeline, mask):
    """A function from changed settings to the image of that mask."""

    def image(mask=mask, row=0, **changes):
        return generate(pipeline, mask[None], ["a lake"], [row], replace(SETTINGS, **changes))[0]

    return image


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (9, 40), (31, 47)])
def test_windows_cover_every_cell_and_blend_without_a_step(size):
    windows, latents = Windows(size, 16, at_once=3), torch.randn(1, 4, *size)
    seen = []

    def own(boxes):
        seen.append(len(boxes))
        return torch.cat([box.cut(latents) for box in boxes])

    assert (
        torch.allclose(windows.blend(own, 4), latents, atol=1e-6) and max(seen) <= 3 and sum(seen) == len(windows.boxes)
    )
    numbers = iter(torch.arange(float(len(windows.boxes))))
    steps = windows.blend(lambda boxes: torch.stack([next(numbers).expand(1, *windows.window) for _ in boxes]), 1)[0, 0]
    across = steps.diff(dim=1).abs().max() if size[1] > 16 else torch.tensor(0.0)
    assert across <= 0.35  # between two windows the weight moves over half of a window, not at once


def test_a_mask_as_large_as_the_resolution_gives_the_bytes_of_ordinary_generation(write, tmp_path):
    whole = write(batch_size=1, resolution=64, output_dir=str(tmp_path / "whole"))
    tiled = write(batch_size=1, resolution=64, tiled=True, output_dir=str(tmp_path / "tiled"))
    assert [path.read_bytes() for path in sorted(whole.glob("images/*"))] == [
        path.read_bytes() for path in sorted(tiled.glob("images/*"))
    ]


def test_an_image_has_any_size_and_is_the_same_for_any_batch_of_windows(made, mask):
    image = made()
    assert image.shape == (58, 100, 3) and image.std() > 5 and np.array_equal(image, made())
    assert np.abs(made(row=1) - image.astype(int)).mean() > 1 and np.abs(made(seed=1) - image.astype(int)).mean() > 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segcn.generate.pipeline.WINDOWS_AT_ONCE", 3)
        assert np.abs(made() - image.astype(int)).max() <= 1
    with pytest.raises(UserError, match=r"--tiled: expected --resolution"):
        made(resolution=None)
    with pytest.raises(UserError, match="--resolution: expected a multiple of"):
        made(resolution=33)


def test_each_window_sees_its_part_of_the_mask(made, mask):
    """What the mask says at the right end reaches, in two steps, only windows that overlap those of the right end."""
    image, other = made(), mask.copy()
    other[:, 92:] = 8
    differs = np.abs(made(other).astype(int) - image).max((0, 2))
    assert differs[92:].max() > 1 and differs[:16].max() == 0


def test_a_set_of_large_masks_is_resumed_and_shared_by_processes_byte_for_byte(config, pipeline, landscapes, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    palette().save(masks / "palette.json")
    for k, size in enumerate([(20, 64), (58, 100), (32, 32)]):
        write_mask(
            masks / f"{k}.png", np.ascontiguousarray(draw_landscape(0, k, 100).mask[: size[0], : size[1]]), palette()
        )
    settings = replace(config, controls=str(masks), prompt="a lake", tiled=True, resolution=32, replicates=2)

    def run(name, *processes):
        for process in processes or [None]:
            generate_dataset(replace(settings, output_dir=str(tmp_path / name)), pipeline, lambda line: None, process)
        return tmp_path / name

    whole = run("whole")
    found = read_split(whole)
    for number, record in enumerate(found.records):
        wanted = read_mask(masks / f"{number // 2}.png", palette())
        assert np.array_equal(read_mask(record.mask, palette()), wanted)
        assert Image.open(record.image).size == wanted.shape[::-1]
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("images/000003.png", "metadata.csv"):
        (tmp_path / "cut" / name).unlink()
    assert tree(run("cut")) == tree(whole)
    with pytest.raises(UserError, match="still missing"):
        run("two", Process(0, 2))
    assert tree(run("two", Process(1, 2), Process(0, 2))) == tree(whole)


def test_what_tiles_cannot_be_combined_with_is_refused(write):
    for name, value in {"from_images": 0.5, "min_miou": 0.5, "augment_masks": "affine", "inpaint": ["sky"]}.items():
        with pytest.raises(UserError, match=f"--tiled .* drop --{name}"):
            write(tiled=True, resolution=32, **{name: value})


def test_infer_keeps_the_size_of_its_mask(random_base, random_controlnet, mask, tmp_path):
    write_mask(tmp_path / "mask.png", mask, palette())
    palette().save(tmp_path / "palette.json")
    given = {"pretrained_model_name_or_path": str(random_base), "controlnet_model_name_or_path": str(random_controlnet)}
    out = infer(make(InferConfig, "tiny", **given, control=str(tmp_path / "mask.png"), prompt=["a", "b"], tiled=True,
                     resolution=32, num_inference_steps=1, out=str(tmp_path / "out.png")))  # fmt: skip
    assert Image.open(out).size == (100, 2 * 58)


def test_sixteen_times_the_area_takes_little_more_memory_than_the_arrays_of_the_image(made):
    peaks = []  # bytes
    for side in (128, 128, 512):  # the first one fills what is kept
        reset_peak(CPU)
        made(np.zeros((side, side), np.uint8), num_inference_steps=1, resolution=64)
        peaks.append(peak_bytes(CPU))
    added = 512**2 - 128**2
    assert peaks[2] - peaks[1] < 40 * added  # a float32 image has 12 bytes a pixel


@pytest.fixture(scope="module")
def large():
    """A landscape's mask, 256 x 256, its image by windows of 128, and by four ordinary ones side by side."""
    settings = make(
        SampleConfig, "tiny", controlnet_model_name_or_path=str(BASE / "controlnet"), resolution=128, tiled=True
    )
    trained, drawn = load_pipeline(settings, palette()), draw_landscape(21, 0, 256)
    quarters = np.stack([drawn.mask[y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128)])
    parts = generate(trained, quarters, [drawn.caption] * 4, [1, 2, 3, 4], settings)
    beside = np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)])
    return drawn.mask, generate(trained, drawn.mask[None], [drawn.caption], [0], settings)[0], beside


def seam(image, mask, borders):
    """The mean absolute gradient across these borders, divided by that elsewhere, away from the mask's outlines."""
    classes = torch.from_numpy(mask)[None].float()
    flat = (max_pool2d(classes, 9, 1, 4) == -max_pool2d(-classes, 9, 1, 4))[0].numpy()  # one class up to 4 px away
    found = np.zeros((2, 2))  # of both: summed gradients, and their number
    for steps, inside in ((image, flat), (image.swapaxes(0, 1), flat.T)):
        across = np.abs(np.diff(steps.astype(float), axis=0)).mean(2)
        inside, at = inside[1:] & inside[:-1], np.isin(np.arange(1, len(steps)), borders)
        found += [[across[part][inside[part]].sum(), inside[part].sum()] for part in (at, ~at)]
    return np.divide(*found[:, 0] / found[:, 1])


def test_no_seam_at_the_borders_of_windows(large):
    mask, tiled, beside = large
    starts = window_starts(256, 128, int(128 * OVERLAP))
    borders = sorted({border for start in starts for border in (start, start + 128)} - {0, 256})
    assert borders == [64, 128, 192]
    assert seam(beside, mask, [128]) > 10  # what is found where there is a seam
    assert seam(tiled, mask, borders) < 1.25 and seam(tiled, mask, [128]) < 2  # of one border in one image: less sure


def test_masks_are_followed_at_the_borders_of_windows_as_elsewhere(large):
    mask, tiled, beside = large
    places = np.abs(np.arange(256)[:, None] + 0.5 - [64, 128, 192]).min(1)
    distance = np.minimum.outer(places, places)
    segmenter = shipped_segmenter(BASE, palette())
    assert segmenter is not None

    def scores(image, zone):
        """mIoU and boundary F of these pixels."""
        predicted = predict(segmenter, to_image(torch.from_numpy(image).permute(2, 0, 1))[None])[0]
        wanted = torch.from_numpy(np.where(zone, mask, 255).astype(np.uint8))
        regions = iou(confusion_matrix(predicted, wanted, segmenter.num_classes)).nanmean()
        outlines = boundary_f(boundary_counts(predicted, wanted, segmenter.num_classes)).nanmean()
        return np.array([float(regions), float(outlines)])

    near, far = scores(tiled, distance <= 12), scores(tiled, distance >= 20)
    assert (near > far - 0.1).all() and (near > scores(beside, distance <= 12)).all()
