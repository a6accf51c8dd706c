"""How long painting takes: one image, and several in one call."""

import os
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from segcn.pipeline import Painter, generate
from segcn.records import Split
from segcn.show import read_pair

STEPS = 20


def seconds(config, real: Split, painter: Painter, log=print) -> dict:
    """Seconds of one image, and of each of `config.batch_size` in one call: medians, a first call left out.

    20 steps with mask and guidance, as `config` has it otherwise.
    """
    settings = replace(config, num_inference_steps=STEPS)
    found = {"machine": machine(painter), "steps": STEPS, "timings": config.timings, "at_once": config.batch_size}
    found["load"] = os.getloadavg()[0]
    for name, count in (("one", 1), ("each_of_many", config.batch_size)):
        log(f"Timing {count} in one call.")
        rows = [row % len(real) for row in range(count)]
        masks = np.stack([read_pair(real, row)[1] for row in rows])
        captions = [real[row].caption for row in rows]
        taken = []
        for _ in range(1 + config.timings):
            began = time.monotonic()
            generate(painter, masks, captions, rows, settings)
            taken.append((time.monotonic() - began) / count)
        found[name] = statistics.median(taken[1:])
    return found


def machine(painter: Painter) -> str:
    """What it runs on: a GPU's name, or CPU cores and PyTorch's threads."""
    if painter.base.unet.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
