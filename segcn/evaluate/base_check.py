"""Does a base fit a data set? Its autoencoder, tokenizer and latent grid, tried on a few rows before any training."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from matplotlib.figure import Figure

from segcn.data.dataset import PairedDataset, to_uint8
from segcn.data.metadata import Split
from segcn.data.transforms import AUGMENTS
from segcn.data.visualize import grid
from segcn.evaluate.evaluator import measure
from segcn.evaluate.metrics import VISIBLE, color_shift
from segcn.models.base import Base, reconstruct
from segcn.models.segmenter import AnySegmenter
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.io import write_whole

BASE_CHECK = "base_check.png"
ROWS, AT_ONCE, SECONDS = 32, 2, 60.0  # rows; as many at once; no further group is begun after so long
MOST_LOST = 6  # rows in the figure
LEAST_PSNR, LEAST_SHARE = 20.0, 0.9  # dB, of the originals' mIoU: below, or where colors shift visibly, it does not fit


@dataclass(frozen=True)
class BaseCheck:
    """What the autoencoder leaves of real images, and what else of the data set the base cannot take."""

    psnr: list[float]  # dB, of each row
    shift: dict[str, float]  # mean color shift of the reconstructions: L, a, b, delta_e
    miou: tuple[float, float] | None  # of a segmenter on the originals, and on the reconstructions
    cut: list[str]  # captions that are longer than the text encoder reads
    tokens: int  # that it reads
    tiny: dict[str, float]  # classes whose median area, where they occur, is below one latent cell; in cells
    figure: Figure

    @property
    def problems(self) -> list[str]:
        """Why the base does not fit; empty where it does."""
        found, worst = [], float(np.median(self.psnr))
        if self.miou and self.miou[0] and self.miou[1] < LEAST_SHARE * self.miou[0]:
            found.append(f"a segmenter finds {self.miou[1] / self.miou[0]:.0%} of what it finds in the originals")
        if self.shift["delta_e"] > VISIBLE:
            found.append(f"colors move by delta E {self.shift['delta_e']:.1f}")
        if worst < LEAST_PSNR:
            found.append(f"PSNR is {worst:.1f} dB")
        return found

    def lines(self) -> list[str]:
        """The findings and a verdict, a sentence each."""
        share = ""
        if self.miou:
            share = f", mIoU of a segmenter {self.miou[1]:.3f} (originals {self.miou[0]:.3f})"
        yes = "The base fits these images" if self.miou else "The base's autoencoder fits these images"
        no = (
            "The base does NOT fit these images, and no ControlNet can make up for that: segcn adapt IMAGES"
            " --vae_decoder teaches its autoencoder, segcn adapt IMAGES its U-Net; or use one that has seen such images"
        )
        lines = [
            f"Base check: reconstructions of {len(self.psnr)} rows: PSNR {np.median(self.psnr):.1f} dB,"
            f" color shift delta E {self.shift['delta_e']:.1f}{share}.",
            f"{no} ({'; '.join(self.problems)})." if self.problems else f"{yes}.",
        ]
        if self.cut:
            lines.append(
                f"{len(self.cut)} captions are longer than the {self.tokens} tokens that the text encoder reads, and"
                f" are cut: {self.cut[0][:60]!r} and so on."
            )
        if self.tiny:
            sizes = ", ".join(f"{name} ({cells:.2g} cells)" for name, cells in self.tiny.items())
            lines.append(f"Too small for the latent grid at this resolution, and hardly to be drawn: {sizes}.")
        return lines

    def write(self, path: Path | None, log: Callable[[str], None] = print) -> None:
        """Say the findings, and write the figure where there is a path."""
        for line in self.lines():
            log(line)
        if path:
            write_whole(path, lambda file: self.figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
            log(f"See {path}.")


def check_base(
    split: Split, base: Base, resolution: int, fit: str = "crop", segmenter: AnySegmenter | None = None
) -> BaseCheck:
    """Send 32 rows through the base's autoencoder and back, and look for what it cannot take.

    segmenter: trained on other rows; none: its share is not measured. On a slow machine fewer rows, within a minute.
    """
    pairs = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit)
    rows, began = rng.permutation(len(split), "base check")[:ROWS], monotonic()
    samples, seen = [], []
    for first in range(0, len(rows), AT_ONCE):
        if first and monotonic() - began > SECONDS:
            break
        group = []
        for row in rows[first : first + AT_ONCE]:
            with suppress(UserError):  # training names it, or skips it
                group.append(pairs.sample(row, 0))
        if not group:
            continue
        samples += group
        seen.append(reconstruct(base.vae, torch.stack([sample.image for sample in group])).float().cpu())
    images, masks = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("image", "mask"))
    reconstructed = torch.cat(seen).clamp(-1, 1)
    error = (reconstructed - images).square().mean((1, 2, 3)).clamp(min=1e-10)
    miou = None
    if segmenter is not None:
        found = [measure([(one, masks)], segmenter, split.palette)["miou"] or 0.0 for one in (images, reconstructed)]
        miou = found[0], found[1]
    limit = base.tokenizer.model_max_length
    captions = list(dict.fromkeys(caption for record in split.records for caption in record.captions))
    lengths = [len(ids) for ids in base.tokenizer(captions).input_ids] if captions else []
    cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]
    cell, areas = base.latent_factor**2, {}
    for label in (label for label in split.palette.labels if not label.ignore):
        pixels = (masks == label.id).sum((1, 2))
        if pixels.any():
            areas[label.name] = pixels[pixels > 0].double().median().item() / cell
    tiny = {name: area for name, area in areas.items() if area < 1}
    shift = color_shift(list(to_uint8(images)), list(to_uint8(reconstructed)))
    psnr = (10 * torch.log10(4 / error)).tolist()
    return BaseCheck(psnr, shift, miou, cut, limit, tiny, _figure(images, reconstructed, psnr))


def _figure(images: torch.Tensor, reconstructed: torch.Tensor, psnr: list[float]) -> Figure:
    """The rows that lost the most: images, reconstructions, and their difference five times as strong."""
    worst = np.argsort(psnr)[:MOST_LOST].tolist()
    error = ((reconstructed - images).abs() * 5 - 1).clamp(-1, 1)
    lines = [to_uint8(part[worst]) for part in (images, reconstructed, error)]
    below = [[""] * len(worst), [f"{psnr[row]:.1f} dB" for row in worst], [""] * len(worst)]
    return grid(lines, left=["image", "through the\nautoencoder", "error x 5"], below=below, width=1.6)
