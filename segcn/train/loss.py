"""The diffusion loss as pure functions, tensors in, one value per sample out; and the check that it stays finite."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from segcn.utils.errors import UserError
from segcn.utils.io import write_text

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # such as diffusion_loss


def diffusion_loss(
    prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error over the latent cells that lie in frame (Ho et al. 2020, arXiv:2006.11239, equation 14).

    prediction, target: [B,C,h,w], noise or v. valid: bool [B,h,w]. weights: of the cells, [B,h,w]; None: all alike.
    Returns float32 [B], the weighted mean; 0 where no cell is in frame.
    """
    error = (prediction.float() - target.float()).square().mean(1)
    weight = valid.float() if weights is None else valid * weights.float()
    return (error * weight).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def min_snr_weights(snr: torch.Tensor, gamma: float, predicts_v: bool) -> torch.Tensor:
    """Min-SNR weights of the samples, [B] (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) in terms of x0.

    snr: signal-to-noise ratios of their timesteps, [B], above 0 where noise is predicted.
    """
    return snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)


def decoder_loss(image: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels plus that of the differences of neighbors (Mathieu et al. 2015,
    arXiv:1511.05440): edges and grain stay, in place of averages of them, without a perceptual network.

    image, target: [B,3,H,W] in [-1,1]. valid: bool [B,H,W], the pixels in frame. Returns float32 [B].
    """
    error, inside = image.float() - target.float(), valid.float()
    total = (error.abs().mean(1) * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    for axis in (2, 3):
        steps = target.diff(dim=axis) - image.float().diff(dim=axis)
        both = inside.narrow(axis - 1, 1, inside.shape[axis - 1] - 1) * inside.narrow(axis - 1, 0, steps.shape[axis])
        total = total + (steps.abs().mean(1) * both).sum((1, 2)) / both.sum((1, 2)).clamp(min=1)
    return total


def valid_cells(valid: torch.Tensor, factor: int) -> torch.Tensor:
    """bool [B,H,W] -> bool [B,H/factor,W/factor]: a latent cell counts if all its pixels are in frame."""
    return -F.max_pool2d(-valid.float()[:, None], factor)[:, 0] == 1


class FiniteCheck:
    """Stops every process before a loss or gradient that is not finite reaches the weights, and names its rows."""

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator, self.path = accelerator, output_dir / "nonfinite.json"
        self.rows: list[torch.Tensor] = []  # of the micro-batches since the last update
        self.losses: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember a micro-batch; rows: int [B], losses: [B]."""
        self.rows.append(rows.to(losses.device))
        self.losses.append(losses.detach())

    def check(self, norm: torch.Tensor | float, step: int) -> None:
        """UserError in all processes alike where the norm of the gradient, which they share, is not finite.

        step: the one about to be made. Half-precision gradients that overflow while all losses are finite are the
        gradient scaler's to skip, as long as it scales at all.
        """
        rows, losses, self.rows, self.losses = self.rows, self.losses, [], []
        if math.isfinite(norm):
            return
        rows, losses = (self.accelerator.gather(torch.cat(added)).tolist() for added in (rows, losses))
        bad = sorted({row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)})
        scaler = self.accelerator.scaler
        if scaler is not None and not bad and scaler.get_scale() > 1:
            return
        rows = sorted(set(rows))
        if self.accelerator.is_main_process:
            found = {"step": step, "gradient_norm": str(float(norm)), "rows_with_bad_loss": bad, "rows": rows}
            write_text(self.path, json.dumps(found, indent=1) + "\n")
        cause = f"the loss of row {', '.join(map(str, bad))}" if bad else f"the gradient of rows {rows}"
        raise UserError(
            f"step {step}: expected finite numbers, found that {cause} is not finite; nothing was updated, and the last"
            f" checkpoint is good. Look at these rows (rows count from 0, see {self.path}), or rerun with a lower"
            " --learning_rate and --allow_changes"
        )
