"""Masks drawn by a network: multinomial diffusion on label maps, conditioned on the share of each class.

Hoogeboom et al. 2021, arXiv:2102.05379, which is D3PM with uniform transitions (Austin et al. 2021, arXiv:2107.03006):
each pixel keeps its label with a probability that falls with time, or gets any label; the network sees the noisy map
and predicts the labels, all pixels at once. It works on small maps, and the probabilities of the last step are
enlarged."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from segcn.models.segmenter import DRAWING, SAID_EVERY
from segcn.utils import io, rng
from segcn.utils.progress import Progress

KEPT = 0.99  # of the running mean of the weights in each step (EMA): the mean is what draws
CELL = 4  # px, the size of the cells that the U-Net works on
STRIDE = 4 * CELL  # px; a cell at its bottleneck


@dataclass(frozen=True)
class MaskDiffusionConfig:
    """What the trained weights depend on, besides the masks."""

    steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 1.5e-3  # peak of the one-cycle schedule
    width: int = 48  # channels of the U-Net's first level
    side: int = 64  # px of the maps
    dropped: float = 0.1  # share of the maps that are shown without their class shares
    seed: int = 0


class MaskDenoiser(nn.Module):
    """Noisy label maps to logits of the labels: diffusers' U-Net on cells of 4 x 4 pixels."""

    def __init__(self, labels: int, width: int):
        super().__init__()
        self.labels = labels
        self.unet = UNet2DModel(
            in_channels=labels * CELL**2 + 2, out_channels=labels * CELL**2, layers_per_block=1,
            block_out_channels=(width, width * 3 // 2, width * 2), norm_num_groups=8, attention_head_dim=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), class_embed_type="identity",
        )  # fmt: skip
        self.embedding = nn.Sequential(nn.Linear(labels + 1, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def forward(self, maps: torch.Tensor, time: torch.Tensor, shares: torch.Tensor, shown: torch.Tensor):
        """maps int64 [B, h, w], time [B] in [0, 1], shares [B, L], shown [B]: 0 hides them -> logits [B, L, h, w]."""
        labels = F.one_hot(maps, self.labels).movedim(-1, 1).float()
        cells = F.pixel_unshuffle(labels * 2, CELL)
        places = torch.linspace(-1, 1, cells.shape[-1]), torch.linspace(-1, 1, cells.shape[-2])
        grid = torch.stack(torch.meshgrid(*places, indexing="xy")).to(cells).expand(len(cells), -1, -1, -1)
        condition = self.embedding(torch.cat([shares.sqrt() * shown[:, None], shown[:, None]], 1))
        return F.pixel_shuffle(self.unet(torch.cat([cells, grid], 1), time * 1000, condition).sample, CELL)


def kept(time: torch.Tensor) -> torch.Tensor:
    """The probability that a pixel still has its label, 1 at time 0 and 0 at time 1.

    The square of the cosine schedule: neighbors say the same, so what is where is decided where almost all is noise
    (Hoogeboom et al. 2023, arXiv:2301.11093).
    """
    return torch.cos(time * math.pi / 2) ** 4


def shrink(masks: np.ndarray, labels: int, side: int) -> torch.Tensor:
    """Labels, uint8 [N, R, R], to the most frequent of each cell, int64 [N, s, s]: s = side, or R rounded down."""
    side = max(STRIDE, min(side, masks.shape[-1]) // STRIDE * STRIDE)
    one_hot = (F.one_hot(torch.from_numpy(mask).long(), labels).movedim(-1, 0).float() for mask in masks)
    return torch.stack([F.adaptive_avg_pool2d(one, side).argmax(0) for one in one_hot])


def shares_of(maps: torch.Tensor, labels: int) -> torch.Tensor:
    """The share of the pixels that each label has, [N, L]."""
    return torch.stack([torch.bincount(one.flatten(), minlength=labels) for one in maps]) / maps[0].numel()


def train_mask_denoiser(
    maps: torch.Tensor, labels: int, mirror: torch.Tensor | None, config: MaskDiffusionConfig, log: Callable = print
) -> tuple[MaskDenoiser, list[float]]:
    """Train on label maps, int64 [N, h, w], for a fixed number of steps; the network, and the loss of each step.

    mirror: the label of each label in the mirrored map [L]; None: maps are not mirrored. The loss is the cross entropy
    of the clean labels (the auxiliary loss of D3PM). The same arguments give the same weights on the same CPU.
    """
    with DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("mask denoiser", config.seed, "weights"))
        denoiser = MaskDenoiser(labels, config.width)
    averaged, losses, shares = copy.deepcopy(denoiser).eval(), list[float](), shares_of(maps, labels)
    mirrored = maps if mirror is None else mirror[maps.flip(-1)]
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    progress, count = Progress("mask diffusion: steps", config.steps, log, SAID_EVERY), config.batch_size
    for step in range(config.steps):
        source = rng.generator("mask denoiser", config.seed, "step", step)
        rows = torch.randint(len(maps), (count,), generator=source)
        flip = torch.rand(count, generator=source) < 0.5
        clean = torch.where(flip[:, None, None], mirrored[rows], maps[rows])
        time = (torch.arange(count) + torch.rand(count, generator=source)) / count
        noise = torch.randint(labels, clean.shape, generator=source)
        noisy = torch.where(torch.rand(clean.shape, generator=source) < kept(time)[:, None, None], clean, noise)
        shown = (torch.rand(count, generator=source) >= config.dropped).float()
        of_clean = shares[rows] if mirror is None else torch.where(flip[:, None], shares[rows][:, mirror], shares[rows])
        loss = F.cross_entropy(denoiser(noisy, time, of_clean, shown), clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        weight = min(KEPT, (step + 1) / (step + 10))
        for mean, value in zip(averaged.parameters(), denoiser.parameters(), strict=True):
            mean.data.lerp_(value.data, 1 - weight)
        losses.append(loss.item())
        progress(step + 1, lambda: f"loss {losses[-1]:.3f}")
    return averaged, losses


def mask_denoiser_of(
    masks: np.ndarray,
    labels: int,
    mirror: np.ndarray | None,
    config: MaskDiffusionConfig,
    cache: Path,
    log: Callable = print,
) -> MaskDenoiser:
    """The network of these masks (labels, uint8 [N, R, R]) and settings: from `cache` where it is, else trained now."""
    maps = shrink(masks, labels, config.side)
    content = json.dumps([asdict(config), labels, None if mirror is None else mirror.tolist(), list(maps.shape)])
    key = hashlib.sha256(content.encode() + maps.numpy().astype(np.uint8).tobytes()).hexdigest()[:16]
    folder = cache / f"mask-diffusion-{key}"
    with io.one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and io.problem(folder) is None:
            log(f"mask diffusion: reused {folder}, trained on the same masks with the same settings")
            denoiser = MaskDenoiser(labels, config.width)
            denoiser.load_state_dict(load_file(folder / "model.safetensors"))
            return denoiser.eval()
        table = None if mirror is None else torch.from_numpy(mirror).long()
        denoiser, losses = train_mask_denoiser(maps, labels, table, config, log)
        settings = json.dumps(asdict(config) | {"labels": labels, "losses": losses}) + "\n"

        def write(staged: Path) -> None:
            save_file(
                {name: one.contiguous() for name, one in denoiser.state_dict().items()}, staged / "model.safetensors"
            )
            (staged / "config.json").write_text(settings)

        io.commit(cache, folder.name, write)
        log(f"mask diffusion: stored in {folder}")
    return denoiser


@torch.no_grad()
def draw_masks(
    denoiser: MaskDenoiser,
    shares: np.ndarray,
    keys: Sequence[tuple[str | int, ...]],
    side: int,
    resolution: int,
    steps: int = 40,
) -> np.ndarray:
    """Draw a label map for each row of `shares` [B, L]: uint8 [B, R, R]; noise depends on its key alone.

    side: px of the maps in training.
    """
    labels, wanted = denoiser.labels, torch.from_numpy(shares).float()
    sources = [rng.generator("draw masks", *key) for key in keys]
    maps = torch.stack([torch.randint(labels, (side, side), generator=source) for source in sources])
    shown = torch.ones(len(maps))
    for step in range(steps):
        now, then = (torch.tensor(1 - (step + more) / steps) for more in (0, 1))
        time = now.expand(len(maps))
        clean = denoiser(maps, time, wanted, shown).softmax(1)
        if step < steps - 1:
            stays = kept(now) / kept(then)
            own = stays * F.one_hot(maps, labels).movedim(-1, 1) + (1 - stays) / labels
            odds = own * (kept(then) * clean + (1 - kept(then)) / labels)  # of the labels one step earlier: equation 13
            edges = (odds / odds.sum(1, keepdim=True)).cumsum(1)
            chance = torch.stack([torch.rand((1, side, side), generator=source) for source in sources])
            maps = (chance > edges).sum(1).clamp(max=labels - 1)
    return F.interpolate(clean, (resolution, resolution), mode="bilinear").argmax(1).byte().numpy()
