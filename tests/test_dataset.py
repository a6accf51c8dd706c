import numpy as np
import pytest
import torch
from PIL import Image

from segcn.augment import AUGMENTS, AugmentConfig, draw
from segcn.dataset import PairedDataset, to_control, to_image, to_uint8
from segcn.errors import UserError
from segcn.labels import IGNORE, Label, Palette, write_mask
from segcn.records import read_split, write_metadata

PALETTE = Palette(
    (
        Label(0, "sky", (135, 206, 235)),
        Label(1, "tree", (0, 100, 0)),
        Label(IGNORE, "unlabelled", (9, 9, 9), ignore=True),
    )
)
SPUN = AugmentConfig(degrees=45.0)


@pytest.fixture
def split(tmp_path):
    noise = np.random.default_rng(0)
    captions = ["a tree", "a tree on the left", "a sky"]
    for row in range(3):
        pixels = noise.integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        write_mask(tmp_path / f"mask-{row}.png", noise.choice([0, 1, 255], (20, 28)).astype(np.uint8), PALETTE)
    PALETTE.save(tmp_path / "palette.json")
    write_metadata(tmp_path, [(f"{k}.png", f"mask-{k}.png", captions[k]) for k in range(3)])
    return read_split(tmp_path)


def test_a_sample_has_the_stated_shapes_and_ranges(split):
    sample = PairedDataset(split, 16, AUGMENTS["affine"], seed=0)[0]
    assert (sample.image.dtype, sample.image.shape) == (torch.float32, (3, 16, 16))
    assert (sample.control.dtype, sample.control.shape) == (torch.float32, (3, 16, 16))
    assert (sample.mask.dtype, sample.mask.shape) == (torch.uint8, (16, 16))
    assert (sample.valid.dtype, sample.valid.shape) == (torch.bool, (16, 16))
    assert -1 <= sample.image.min() < -0.2 and 0.2 < sample.image.max() <= 1
    assert sample.control.min() >= 0 and sample.control.max() <= 1
    assert sample.caption == "a tree"


def test_the_control_is_the_palette_and_black_out_of_frame(split):
    sample = PairedDataset(split, 16, SPUN, seed=0)[0]
    expected = torch.from_numpy(PALETTE.table[sample.mask.numpy()]).permute(2, 0, 1) / 255
    assert not sample.valid.all()
    assert torch.equal(sample.control, expected * sample.valid)
    unlabelled_inside = sample.valid & (sample.mask == IGNORE)
    assert unlabelled_inside.any()
    assert torch.allclose(sample.control[:, unlabelled_inside], torch.tensor(9 / 255))


def test_the_original_is_the_file_untouched(split):
    sample = PairedDataset(split, 16, SPUN, seed=0)[2]
    with Image.open(split[2].image) as image:
        assert np.array_equal(sample.original.permute(1, 2, 0), np.asarray(image))


def test_an_index_is_a_row_of_an_epoch(split):
    dataset = PairedDataset(split, 16, AUGMENTS["affine"], seed=5)
    assert len(dataset) == len(list(dataset)) == 3
    later, direct = dataset[7], dataset.sample(row=1, epoch=2)
    assert later.draw == direct.draw == draw(AUGMENTS["affine"], 5, 2, 1, split[1].caption)
    assert torch.equal(later.image, direct.image) and torch.equal(later.mask, direct.mask)
    assert not torch.equal(later.image, dataset[1].image)


def test_a_sample_is_the_same_in_any_order(split):
    ahead = [sample.image for sample in PairedDataset(split, 16, SPUN, seed=0)]
    dataset = PairedDataset(split, 16, SPUN, seed=0)
    torch.rand(5)
    for row in (2, 0, 1):
        assert torch.equal(dataset[row].image, ahead[row])


def test_captions_that_name_a_side_are_not_flipped(split):
    dataset = PairedDataset(split, 16, AugmentConfig(hflip=1.0), seed=0)
    assert dataset[0].draw.flip and not dataset[1].draw.flip


def test_without_augmentation_every_epoch_is_the_same(split):
    dataset = PairedDataset(split, 16, AUGMENTS["none"], seed=0)
    assert torch.equal(dataset[0].image, dataset[3].image)
    assert dataset[0].valid.all()


def test_a_mask_of_another_size_is_named(split):
    write_mask(split[1].mask, np.zeros((20, 27), np.uint8), PALETTE)
    with pytest.raises(UserError, match=r"metadata.csv, line 3 \(row 1\): .*28 x 20, found 27 x 20"):
        PairedDataset(split, 16, AUGMENTS["none"], seed=0)[1]


def test_a_broken_image_is_named(split):
    split[0].image.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"line 2 \(row 0\): .*0.png: the image cannot be read"):
        PairedDataset(split, 16, AUGMENTS["none"], seed=0)[0]


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    image = to_image(pixels)
    assert (image.min(), image.max()) == (-1, 1)
    assert np.array_equal(to_uint8(image), pixels.permute(0, 2, 3, 1))
    assert to_uint8(torch.full((3, 1, 1), 2.0)).tolist() == [[[255, 255, 255]]]


def test_controls_come_in_stacks():
    mask = torch.tensor([[[0, 1]], [[1, 1]]], dtype=torch.uint8)
    assert to_control(mask, PALETTE).shape == (2, 3, 1, 2)
    assert torch.equal(to_control(mask, PALETTE)[0], to_control(mask[0].numpy(), PALETTE))
