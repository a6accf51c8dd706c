"""The diffusion loss: tensors in, one value per sample out."""

import torch
import torch.nn.functional as F


def diffusion_loss(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the latent cells that lie in frame (Ho et al. 2020, arXiv:2006.11239, equation 14).

    prediction, target: [B,C,h,w], noise or v. valid: bool [B,h,w]. Returns float32 [B]; 0 where no cell is in frame.
    """
    error = (prediction.float() - target.float()).square().mean(1)
    weight = valid.float()
    return (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def valid_cells(valid: torch.Tensor, factor: int) -> torch.Tensor:
    """bool [B,H,W] -> bool [B,H/factor,W/factor]: a latent cell counts if all its pixels are in frame."""
    return -F.max_pool2d(-valid.float()[:, None], factor)[:, 0] == 1
