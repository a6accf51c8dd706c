"""Promise: a CPU keeps the memory that it frees, and weights have the memory format that convolutions are fast in."""

import ctypes
import os
import platform
import resource

import pytest
import torch
from diffusers import UNet2DConditionModel

from segcn.models.base import MMAP_MAX, TRIM_THRESHOLD, keep_freed_memory, lay_out

PAGE = resource.getpagesize()


def pages_taken(size=64 * 2**20):
    """Pages that the system had to hand out for memory that has been allocated and freed before."""
    b"1" * size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def forget():
    """The defaults of malloc, which an earlier test may have changed."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_MAX, 65536)
    mallopt(TRIM_THRESHOLD, 128 * 2**10)


def pages_in_fork(work):
    """What `work` leaves for `pages_taken`, seen in a process of its own."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        work()
        os.write(writer, str(pages_taken()).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reader, 99))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a setting for it")
def test_freed_memory_is_kept_and_not_fetched_again():
    whole = 64 * 2**20 // PAGE
    assert pages_in_fork(forget) > whole / 2
    assert pages_in_fork(keep_freed_memory) < whole / 10


@pytest.mark.parametrize(("width", "channels_last"), [(32, True), (320, False)])
def test_only_narrow_networks_lie_in_channels_last_on_a_cpu(width, channels_last):
    unet = UNet2DConditionModel(
        block_out_channels=(width,), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    weight = lay_out(unet, "cpu").down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last
