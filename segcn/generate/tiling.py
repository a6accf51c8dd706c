"""Images larger than the network: overlapping windows under one mask, blended in every step and in the decoding.

MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113): each window is denoised with its part of the mask, and where
windows overlap their predictions are averaged, here with smooth weights, so that there is one image and no seam."""

from collections.abc import Callable, Sequence

import torch

from segcn.data.transforms import Box, window_starts

OVERLAP = 0.5  # share of a window that its neighbor covers, too, at least


class Windows:
    """Windows that cover latents of `size` (height, width), with weights whose sum is 1 in every cell."""

    def __init__(self, size: tuple[int, int], side: int, at_once: int):
        """side: of a window, in cells; along a shorter side of the latents a window is as long as these."""
        self.size, self.at_once = size, at_once
        self.window = [min(side, length) for length in size]
        self.starts = [
            window_starts(length, own, int(own * OVERLAP)) for length, own in zip(size, self.window, strict=True)
        ]
        self.boxes = [Box(top, left, *self.window) for top in self.starts[0] for left in self.starts[1]]

    def blend(self, make: Callable[[Sequence[Box]], torch.Tensor], channels: int, scale: int = 1) -> torch.Tensor:
        """The weighted mean of what `make` gives: of N windows [N, C, s h, s w] -> of all float32 [1, C, s H, s W].

        make: gets `at_once` windows at a time. scale: s, pixels per cell where it decodes.
        """
        down, across = (
            _weights(length * scale, own * scale, [start * scale for start in starts])
            for length, own, starts in zip(self.size, self.window, self.starts, strict=True)
        )
        total = torch.zeros(1, channels, *(length * scale for length in self.size))
        for first in range(0, len(self.boxes), self.at_once):
            boxes = self.boxes[first : first + self.at_once]
            made = make(boxes)
            total = total.to(made.device)
            for box, one in zip(boxes, made, strict=True):
                top, left, *_ = place = Box(*(each * scale for each in box))
                place.cut(total)[0] += one * (down[top][:, None] * across[left]).to(one)
        return total


def _weights(length: int, size: int, starts: Sequence[int]) -> dict[int, torch.Tensor]:
    """Of the window at each start its weights along one side, float32 [size]: a sine's square, the sum of all is 1."""
    own = torch.sin(torch.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += own
    return {start: (own / total[start : start + size]).float() for start in starts}
