"""Learn from (image, segmentation mask, caption) to generate images that follow a mask and a text."""

import logging
import os

# Threads that wait for others give their core back after some 10 microseconds, not milliseconds: as fast on an idle
# machine, twice as fast beside other work. PyTorch reads it when it is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Imported by diffusers, bitsandbytes looks on some CPUs for a kernel on the hub that nothing here needs, and says so.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
