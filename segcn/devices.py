"""Which device computes, and how networks and memory are laid out for it."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import ModelMixin

WIDE = 320  # channels of the first block: Stable Diffusion's
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # the names of mallopt(3)


def pick_device(name: str | None = None) -> str:
    """The device of that name; none: a GPU where there is one, else the CPU."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory(device: str | torch.device = "cpu") -> bool:
    """Let a process that computes on the CPU keep the memory that it frees; whether its C library (glibc) can.

    Otherwise each step gives its tensors' pages back to the system and has them cleared anew, which takes up to a third
    of a CPU's time; `segcn bench step` measures it. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if torch.device(device).type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))


def give_freed_memory_back() -> None:
    """Return to the system what was kept until now, so that a peak can be measured from here."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def lay_out(network: "ModelMixin", device: str | torch.device) -> "ModelMixin":
    """Move a network of diffusers to a device, its weights in the order in which convolutions are fastest there.

    That is channels_last, but for wide networks on CPUs (`segcn bench step` measures it).
    """
    wide_on_cpu = torch.device(device).type == "cpu" and network.config.block_out_channels[0] >= WIDE
    layout = torch.contiguous_format if wide_on_cpu else torch.channels_last
    return network.to(device, memory_format=layout)


@contextlib.contextmanager
def one_core() -> Iterator[int]:
    """Compute on one core for as long as the block lasts, as sums depend on how they are split; the cores there are."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)
