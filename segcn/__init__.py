"""Learn from (image, segmentation mask, caption) to generate images that follow a mask and a text."""

import logging

# Imported by diffusers, bitsandbytes looks on some CPUs for a kernel on the hub that nothing here needs, and says so.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
