"""Learn from (image, segmentation mask, caption) to paint new images that obey a mask and a text."""
