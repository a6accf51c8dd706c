"""Masks and captions to images: one, or a data set. Widget, notebook, command line and validation all come here."""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from segcn import seeds
from segcn.augment import AUGMENTS
from segcn.checkpoint import write_text
from segcn.config import OUTPUTS, GenerateConfig, SampleConfig, main_guard, parse
from segcn.dataset import PairedDataset, read_control_mask, to_control, to_uint8
from segcn.errors import UserError
from segcn.labels import Palette, find_palette, write_mask
from segcn.models import Base, load_base, load_controlnet, reconstruct, weights_digest
from segcn.progress import Progress
from segcn.records import Split, read_named_split, write_metadata

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MASK_SUFFIXES = {".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"}
SETTINGS_FILE = "generation.json"


@dataclass
class Painter:
    """A base, a ControlNet and the palette that it understands."""

    base: Base
    controlnet: ControlNetModel | None
    palette: Palette
    controlnet_folder: str


def load_painter(settings: SampleConfig, palette: Palette | None = None) -> Painter:
    """Load base and ControlNet for a palette; without one, the ControlNet's own palette is used."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[settings.mixed_precision]
    folder = settings.controlnet_model_name_or_path or find_controlnet(settings.pretrained_model_name_or_path, palette)
    own = Path(folder) / "palette.json"
    if palette is None:
        if not own.is_file():
            raise UserError(f"{folder} holds no palette.json: name the masks' palette by --palette")
        palette = Palette.load(own)
    elif own.is_file() and Palette.load(own).fingerprint != palette.fingerprint:
        raise UserError(f"{folder} was trained with another palette than the masks' one: compare {own}")
    base = load_base(settings.pretrained_model_name_or_path, device, dtype)
    return Painter(base, load_controlnet(folder, dtype).to(device).eval(), palette, str(folder))


def find_controlnet(base_folder: str, palette: Palette | None = None) -> str:
    """The newest finished ControlNet below outputs/ for this base and palette, else the one shipped with the base."""
    candidates = []
    for run in OUTPUTS.glob("**/train_config.json"):
        folder, made_for = run.parent, json.loads(run.read_text())
        finished = (folder / "diffusion_pytorch_model.safetensors").is_file()
        same_base = Path(made_for["pretrained_model_name_or_path"]).absolute() == Path(base_folder).absolute()
        same_palette = palette is None or made_for["palette_fingerprint"] == palette.fingerprint
        if finished and same_base and same_palette:
            candidates.append((run.stat().st_mtime, str(folder)))
    if candidates:
        return max(candidates)[1]
    shipped = Path(base_folder) / "controlnet"
    if shipped.is_dir():
        return str(shipped)
    raise UserError(
        f"no ControlNet for {base_folder} and this palette: train one, or --controlnet_model_name_or_path DIR"
    )


def generate(
    painter: Painter,
    masks: np.ndarray | None,
    captions: list[str],
    rows: list[int],
    settings: SampleConfig,
    size: tuple[int, int] | None = None,
    on_step: Callable[[int], bool | None] | None = None,
) -> np.ndarray:
    """Paint one image per caption: uint8 [N,H,W,3].

    masks: uint8 [N,H,W] class ids, or None to paint without (then `size` is (H,W)). The noise of an image depends on
    (settings.seed, its entry in rows) alone. `on_step(step)` is called after each denoising step; True stops.
    """
    height, width = size or masks.shape[1:]
    factor = painter.base.latent_factor
    if height % factor or width % factor:
        raise UserError(
            f"expected masks with sides that are multiples of {factor}, found {width} x {height}: "
            "--resolution paints their centred square at a size of your own"
        )
    shape = (painter.base.unet.config.in_channels, height // factor, width // factor)
    noise = torch.stack([seeds.normal(shape, "paint", settings.seed, row) for row in rows])
    controlnet = None if masks is None else embedding_once(painter.controlnet, len(captions))
    pipe = make_pipeline(painter.base, settings, controlnet)
    control = {}
    if masks is not None:
        control = {
            "image": to_control(masks, painter.palette).to(painter.base.unet.dtype),
            "controlnet_conditioning_scale": settings.controlnet_conditioning_scale,
            "control_guidance_start": settings.control_guidance_start,
            "control_guidance_end": settings.control_guidance_end,
        }

    def after_step(pipe, step, timestep, values):
        pipe._interrupt = bool(on_step and on_step(step + 1))
        return values

    images = pipe(
        prompt=list(captions),
        negative_prompt=[settings.negative_prompt] * len(captions),
        height=height,
        width=width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        latents=noise.to(painter.base.unet.device, painter.base.unet.dtype),
        output_type="np",
        callback_on_step_end=after_step,
        **control,
    ).images
    return (images * 255).round().astype(np.uint8)


class EmbeddedOnce(torch.nn.Module):
    """Embeds the control in the first step and keeps it: it is the same in each step and in both halves of guidance."""

    def __init__(self, embedding: torch.nn.Module, pictures: int):
        super().__init__()
        self.embedding, self.pictures, self.kept = embedding, pictures, None

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        """control [B or 2B, 3, H, W], B the number of pictures -> [B or 2B, C, h, w]."""
        if self.kept is None:
            once = self.embedding(control[: self.pictures])
            self.kept = torch.cat([once] * (len(control) // self.pictures))
        return self.kept


def embedding_once(controlnet: ControlNetModel, pictures: int) -> ControlNetModel:
    """The ControlNet, its weights shared, for a single call of a pipeline: its control must not change."""
    shared = copy.copy(controlnet)
    embedding = EmbeddedOnce(controlnet.controlnet_cond_embedding, pictures)
    shared._modules = {**controlnet._modules, "controlnet_cond_embedding": embedding}
    return shared


def make_pipeline(base: Base, settings: SampleConfig, controlnet: ControlNetModel | None = None):
    """diffusers' own pipeline around the loaded parts, without a safety checker (it blacks pictures out)."""
    if settings.scheduler not in SCHEDULERS:
        raise UserError(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, found {settings.scheduler!r}")
    parts = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": SCHEDULERS[settings.scheduler].from_config(base.scheduler.config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if controlnet is not None:
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    else:
        pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_dataset(config: GenerateConfig, painter: Painter | None = None, log: Callable = print) -> Path:
    """Paint every row of a data set or folder of masks and write the result as a data set; the same command goes on."""
    paths, captions, palette = read_controls(config)
    painter = painter or load_painter(config, palette)
    out = claim_output(config, painter)
    masks = [read_control_mask(path, palette, config.resolution) for path in paths]
    names = [f"images/{row:06d}.png" for row in range(len(paths))]
    todo = [row for row, name in enumerate(names) if not (out / name).is_file()]
    if len(todo) < len(names):
        log(f"{out}: {len(names) - len(todo)} of {len(names)} images stand already and are kept.")
    told, done = Progress("painted", len(todo), log), 0
    for group in batches_of(todo, masks, config.batch_size):
        stack = np.stack([masks[row] for row in group])
        shown = None if config.without_control else stack
        images = generate(painter, shown, [captions[row] for row in group], group, config, stack.shape[1:])
        for row, image in zip(group, images, strict=True):
            write_pair(out, row, image, masks[row], palette)
        done += len(group)
        told(done)
    return finish_dataset(out, captions, palette)


def batches_of(rows: list[int], masks: list[np.ndarray], batch_size: int):
    """Consecutive rows of one mask size, at most batch_size together."""
    group: list[int] = []
    for row in rows:
        if group and (len(group) == batch_size or masks[row].shape != masks[group[0]].shape):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def read_controls(config: GenerateConfig) -> tuple[list[Path], list[str], Palette]:
    """Mask files, captions and palette of --controls, cut at --limit."""
    folder = Path(config.controls)
    is_dataset = folder.is_file() or any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*"))
    if is_dataset:
        split = read_named_split(folder, config.split)
        paths, captions = [r.mask for r in split.records], [r.caption for r in split.records]
        palette = Palette.load(config.palette) if config.palette else split.palette
    else:
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in MASK_SUFFIXES)
        if not paths:
            raise UserError(f"--controls {folder}: expected a data set or a folder of masks (PNG), found neither")
        if config.prompt is None:
            raise UserError(f"--controls {folder} has no captions: give one by --prompt")
        palette, captions = Palette.load(config.palette or find_palette(folder)), [""] * len(paths)
    captions = [config.prompt] * len(paths) if config.prompt is not None else captions
    return paths[: config.limit], captions[: config.limit], palette


def claim_output(config: GenerateConfig, painter: Painter) -> Path:
    """Write the settings to the output folder, or hold them against those that stand there."""
    if not config.output_dir:
        raise UserError("--output_dir: expected a folder to write to, found nothing")
    out = Path(config.output_dir)
    settings = asdict(config) | {"base_fingerprint": painter.base.fingerprint}
    for name in ("batch_size", "controlnet_model_name_or_path", "limit", "output_dir"):  # these change no image
        settings.pop(name)
    if not config.without_control:
        settings |= {"controlnet": painter.controlnet_folder, "controlnet_weights": weights_digest(painter.controlnet)}
    path = out / SETTINGS_FILE
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [
            f"{name}: was {old.get(name)!r}, is {settings[name]!r}"
            for name in settings
            if old.get(name) != settings[name]
        ]
        if changed:
            raise UserError(f"{out} holds images made with other settings:\n  " + "\n  ".join(changed)
                            + "\nMove it away, or choose another --output_dir.")  # fmt: skip
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--output_dir {out} is not empty and was not written by segcn generate: choose another.")
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return out


def write_pair(out: Path, row: int, image: np.ndarray, mask: np.ndarray, palette: Palette) -> None:
    """Write mask, then image, each in one step: an image that stands is whole and has its mask."""
    for folder, save in (
        ("masks", lambda path: write_mask(path, mask, palette)),
        ("images", lambda path: Image.fromarray(image).save(path, format="PNG")),
    ):
        aside = out / folder / f".{row:06d}.staged"
        save(aside)
        os.replace(aside, out / folder / f"{row:06d}.png")


def finish_dataset(out: Path, captions: list[str], palette: Palette) -> Path:
    """The palette and, last, the metadata that makes the folder a data set."""
    palette.save(out / "palette.json")
    write_metadata(out, [(f"images/{k:06d}.png", f"masks/{k:06d}.png", text) for k, text in enumerate(captions)])
    return out


def reconstruct_dataset(split: Split, base: Base, out: Path, resolution: int, batch_size: int = 16) -> Path:
    """The real images through the autoencoder and back, as a data set: the ceiling of a latent model."""
    pairs = PairedDataset(split, resolution, AUGMENTS["none"], seed=0)
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pairs), batch_size):
        samples = [pairs.sample(row, 0) for row in range(first, min(first + batch_size, len(pairs)))]
        images = to_uint8(reconstruct(base.vae, torch.stack([sample.image for sample in samples])))
        for row, (sample, image) in enumerate(zip(samples, images, strict=True), first):
            write_pair(out, row, image, sample.mask.numpy(), split.palette)
    return finish_dataset(out, [record.caption for record in split.records], split.palette)


def main() -> None:
    """Command line: the same as `segcn generate`."""
    main_guard(lambda: print(generate_dataset(parse(GenerateConfig, sys.argv[1:], "segcn generate"))))


if __name__ == "__main__":
    main()
