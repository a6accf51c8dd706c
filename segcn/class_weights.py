"""The loss weighted by class: rare classes count more, and unlabelled pixels not at all."""

import numpy as np
import torch
import torch.nn.functional as F

from segcn.balance import frequencies


def class_weights(pixels: np.ndarray, exponent: float) -> torch.Tensor:
    """The weight of each class id, float32 [256]: 1 / (share of the labelled pixels)^exponent, scaled.

    pixels: counts [N, classes]. The mean over all labelled pixels is 1; 255 and classes without a pixel get 0.
    """
    share = frequencies(pixels)[1]
    weights = np.zeros(256, np.float32)
    shown = np.flatnonzero(share)
    weights[shown] = share[shown] ** -exponent / (share[shown] ** (1 - exponent)).sum()
    return torch.from_numpy(weights)


def cell_weights(mask: torch.Tensor, weights: torch.Tensor, factor: int) -> torch.Tensor:
    """Class ids, uint8 [H,W] -> the mean weight of the pixels of each latent cell, float32 [H/factor,W/factor]."""
    return F.avg_pool2d(weights[mask.long()][None], factor)[0]
