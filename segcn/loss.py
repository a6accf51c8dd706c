"""The diffusion loss: tensors in, one value per sample out."""

import torch
import torch.nn.functional as F


def diffusion_loss(
    prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error over the latent cells that lie in frame (Ho et al. 2020, arXiv:2006.11239, equation 14).

    prediction, target: [B,C,h,w], noise or v. valid: bool [B,h,w]. weights: of the cells, [B,h,w]; none: all alike.
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


def valid_cells(valid: torch.Tensor, factor: int) -> torch.Tensor:
    """bool [B,H,W] -> bool [B,H/factor,W/factor]: a latent cell counts if all its pixels are in frame."""
    return -F.max_pool2d(-valid.float()[:, None], factor)[:, 0] == 1
