"""Validation pictures: the ControlNet in training paints the same masks with the same noise again and again."""

import dataclasses

import numpy as np
from PIL import Image

from segcn.arguments import make
from segcn.config import SampleConfig
from segcn.dataset import read_control_mask
from segcn.pipeline import Painter, generate
from segcn.prepare import Run


def paint_validation(run: Run) -> None:
    """Write output_dir/validation/step-N.png: a row of masks above a row of pictures for each seed."""
    config, accelerator = run.config, run.accelerator
    if accelerator.is_main_process:
        masks, prompts = validation_pairs(run)
        controlnet = accelerator.unwrap_model(run.controlnet).eval()
        painter = Painter(run.base, controlnet, run.split.palette, str(run.output_dir))
        settings = make(SampleConfig, config.preset, pretrained_model_name_or_path=run.base.folder)
        lines = [run.split.palette.table[masks]]
        for number in range(config.num_validation_images):
            seeded = dataclasses.replace(settings, seed=config.seed + number)
            lines.append(generate(painter, masks, prompts, list(range(len(masks))), seeded))
        controlnet.train()
        sheet = np.concatenate([np.concatenate(list(line), axis=1) for line in lines])
        folder = run.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        Image.fromarray(sheet).save(folder / f"step-{run.step:06d}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", sheet, run.step, dataformats="HWC")
    accelerator.wait_for_everyone()


def validation_pairs(run: Run) -> tuple[np.ndarray, list[str]]:
    """Masks uint8 [N,R,R] and a prompt for each; a single mask or prompt is repeated."""
    images, prompts = run.config.validation_image, run.config.validation_prompt
    count = max(len(images), len(prompts))
    masks = [read_control_mask(path, run.split.palette, run.config.resolution, run.config.fit) for path in images]
    return np.stack((masks * count)[:count]), (list(prompts) * count)[:count]
