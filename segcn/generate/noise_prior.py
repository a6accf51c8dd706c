"""Noise priors: what the latents of real images are like where a class lies, to start painting from.

SCP-Diff (Gao et al. 2024, arXiv:2403.09638) draws each latent cell from a Gaussian with the mean and deviation that
training rows have where the same class lies at the same place, or where too few do, the class at any place; noised, it
stands in for pure noise."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segcn.data.dataset import PairedDataset
from segcn.data.metadata import read_named_split
from segcn.data.palette import Palette
from segcn.data.transforms import AUGMENTS
from segcn.models.base import Base, encode_moments, sample_latents
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.io import one_at_a_time, write_whole
from segcn.utils.paths import OUTPUTS
from segcn.utils.progress import Progress

VERSION = 1  # of the files; another number makes other files
ROWS = 1000  # training rows at most
ENOUGH = 16  # rows that show a class at a place for their own statistics to count there
BATCH = 16


@dataclass(frozen=True)
class NoisePrior:
    """Means and deviations of scaled latents, of K classes and, as the last, of what has no class or an unseen one."""

    mean: torch.Tensor  # [K + 1, C, h, w], by place
    std: torch.Tensor
    class_mean: torch.Tensor  # [K + 1, C], at any place: for masks of another size
    class_std: torch.Tensor

    def draw(self, masks: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        """Latents float32 [B, C, h, w] for masks, uint8 [B, H, W], from standard normal noise of their shape."""
        ids = cells(masks, noise.shape[-2:]).clamp(max=len(self.mean) - 1)
        if noise.shape[-2:] != self.mean.shape[-2:]:
            mean, std = (part[ids].permute(0, 3, 1, 2) for part in (self.class_mean, self.class_std))
        else:
            rows, columns = (torch.arange(count) for count in noise.shape[-2:])
            where = (ids, slice(None), rows[:, None], columns)
            mean, std = (part[where].permute(0, 3, 1, 2) for part in (self.mean, self.std))
        return mean.to(noise.device) + std.to(noise.device) * noise


def open_prior(
    source: str, base: Base, palette: Palette, side: int, fit: str = "crop", log: Callable[[str], None] = print
) -> NoisePrior:
    """The noise prior in a .safetensors file, or that of a data set's training rows at `side` pixels, made once.

    UserError where it is of another base or palette.
    """
    if Path(source).suffix == ".safetensors":
        return read_prior(Path(source), base, palette)
    split = read_named_split(source, f"train[:{ROWS}]")
    if split.palette.fingerprint != palette.fingerprint:
        raise UserError(
            f"--noise_prior {source}: expected the masks' palette, {palette.names}, found {split.palette.names}"
        )
    pairs = PairedDataset(split, side, AUGMENTS["none"], 0, fit)
    parts = [VERSION, base.fingerprint, split.fingerprint, len(split), side, fit]
    path = OUTPUTS / "noise_priors" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.safetensors"
    with one_at_a_time(path.with_suffix(".lock")):
        if not path.is_file():
            write_prior(measure_prior(pairs, base, log), path, base, palette)
            log(f"Noise prior of {len(split)} rows: {path}")
    return read_prior(path, base, palette)


def source_digest(source: str) -> str:
    """16 hexadecimal digits that change with a noise prior's file, or with the rows that it would be made from."""
    if Path(source).suffix != ".safetensors":
        return read_named_split(source, f"train[:{ROWS}]").fingerprint
    try:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"--noise_prior {source}: cannot be read: {error.strerror}") from None


def measure_prior(pairs: PairedDataset, base: Base, log: Callable[[str], None] = print) -> NoisePrior:
    """Encode every row once, and take means and deviations class by class."""
    side, classes = pairs.resolution // base.latent_factor, pairs.split.palette.num_classes
    count = total = squares = torch.zeros((), dtype=torch.double)
    told = Progress("rows encoded for the noise prior", len(pairs), log)
    for first in range(0, len(pairs), BATCH):
        samples = [pairs.sample(row, 0) for row in range(first, min(first + BATCH, len(pairs)))]
        moments = encode_moments(base.vae, torch.stack([sample.image for sample in samples])).cpu()
        latents = sample_latents(base.vae_config, moments, torch.zeros(())).double()  # [B, C, h, w], the means
        ids = cells(np.stack([sample.mask.numpy() for sample in samples]), (side, side)).clamp(max=classes)
        shown = torch.nn.functional.one_hot(ids, classes + 1).double()  # [B, h, w, K + 1]
        count = count + shown.sum(0).permute(2, 0, 1)[:, None]  # [K + 1, 1, h, w]
        total = total + torch.einsum("bhwk,bchw->kchw", shown, latents)
        squares = squares + torch.einsum("bhwk,bchw->kchw", shown, latents.square())
        told(first + len(samples))
    return summarise(count, total, squares)


def summarise(count: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> NoisePrior:
    """Sums over rows, [K + 1, 1 or C, h, w], to means and deviations; what was not seen takes what is next wider."""
    anywhere = [part.sum((2, 3), keepdim=True) for part in (count, total, squares)]
    everything = [part.sum(0, keepdim=True) for part in anywhere]
    unseen = (anywhere[0] == 0) | (torch.arange(len(count)) == len(count) - 1)[:, None, None, None]
    of_class = [torch.where(unseen, wide, own) for wide, own in zip(everything, anywhere, strict=True)]
    rare = (count < ENOUGH) | unseen
    of_place = [torch.where(rare, wide, own) for wide, own in zip(of_class, (count, total, squares), strict=True)]
    return NoisePrior(*gaussian(*of_place), *(part.flatten(1) for part in gaussian(*of_class)))


def gaussian(count: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, float32."""
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


def cells(masks: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """The class in the middle of each latent cell: uint8 [B, H, W] -> int64 [B, h, w]; 255 stays."""
    high, wide = (pixels // count for pixels, count in zip(masks.shape[1:], shape, strict=True))
    return torch.from_numpy(masks[:, high // 2 :: high, wide // 2 :: wide].astype(np.int64))


def prior_noise(shape: tuple[int, ...], seed: int, rows: list[int]) -> torch.Tensor:
    """What the cells of each row are drawn from, [B, C, h, w]: other noise than that which is added to them."""
    return torch.stack([rng.normal(shape, "noise prior", seed, row) for row in rows])


def write_prior(prior: NoisePrior, path: Path, base: Base, palette: Palette) -> None:
    """Store it in one step, with the fingerprints of what it was made with."""
    tensors = {name: tensor.contiguous() for name, tensor in vars(prior).items()}
    made_for = {"base": base.fingerprint, "palette": palette.fingerprint}
    write_whole(path, lambda aside: save_file(tensors, aside, metadata=made_for))


def read_prior(path: Path, base: Base, palette: Palette) -> NoisePrior:
    """What `write_prior` stored; UserError where it is no such file, or of another base or palette."""
    wanted = {"base": base.fingerprint, "palette": palette.fingerprint}
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
        prior = NoisePrior(**load_file(path))
    except Exception as error:  # safetensors raises an error of its own for each way of being broken
        raise UserError(f"--noise_prior {path}: expected a noise prior's file, which --noise_prior DATASET makes: "
                        f"{error}") from None  # fmt: skip
    for name, fingerprint in wanted.items():
        if found.get(name) != fingerprint:
            raise UserError(
                f"--noise_prior {path}: it was made for another {name}; --noise_prior DATASET makes one anew"
            )
    return prior
