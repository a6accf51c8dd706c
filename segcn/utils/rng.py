"""Counter-based randomness: every draw is a function of a key, never of generator state.

The idea is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): hash the counter and nothing has to
be carried along, so a run can be resumed, reordered or split over processes without changing a single draw."""

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time where a tensor is drawn: it takes seconds to be imported
    import torch


def seed_of(*key: str | int) -> int:
    """Hash a key of strings and integers to a 63-bit seed, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: str | int, device: "str | torch.device" = "cpu") -> "torch.Generator":
    """A fresh generator that depends on the key alone; on another kind of device its numbers are other ones."""
    import torch

    return torch.Generator(device).manual_seed(seed_of(*key))


def normal(shape: tuple[int, ...], *key: str | int) -> "torch.Tensor":
    """Standard normal float32 tensor of `shape`."""
    import torch

    return torch.randn(shape, generator=generator(*key))


def uniform(*key: str | int) -> float:
    """A number in [0, 1), exact to 2^-53."""
    return (seed_of(*key) >> 10) / 2**53


def between(low: float, high: float, *key: str | int) -> float:
    """A number in [low, high)."""
    return low + (high - low) * uniform(*key)


def integer(high: int, *key: str | int) -> int:
    """An integer in [0, high)."""
    return math.floor(uniform(*key) * high)


def permutation(count: int, *key: str | int) -> list[int]:
    """The numbers 0 to count - 1 in an order that depends on the key alone."""
    import torch

    return torch.randperm(count, generator=generator(*key)).tolist()
