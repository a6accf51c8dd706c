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

    20 steps with mask and guidance, as `config` has it otherwise. The seconds of CPU time of all threads, `cpu_...`,
    hold on a busy machine too.
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
            began = np.array([time.monotonic(), time.process_time()])
            generate(painter, masks, captions, rows, settings)
            taken.append((np.array([time.monotonic(), time.process_time()]) - began) / count)
        found[name], found[f"cpu_{name}"] = (
            statistics.median(map(float, column[1:])) for column in zip(*taken, strict=True)
        )
    return found


def machine(painter: Painter) -> str:
    """What it runs on: a GPU's name, or CPU cores and PyTorch's threads."""
    if painter.base.unet.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
