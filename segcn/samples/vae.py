"""Step 1 of the embedded base: an autoencoder that turns a picture into 12 channels at an eighth of its size.

The network is Stable Diffusion's own (Rombach et al. 2022, arXiv:2112.10752), narrow enough for a laptop. It is
convolutional, so it learns from small crops; the loss keeps edges instead of asking a downloaded perceptual network.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from segcn import checkpoint, seeds


@dataclass(frozen=True)
class VaeRecipe:
    steps: int = 3600  # optimizer steps
    batch_size: int = 8  # crops a step
    crop: int = 64  # pixels a side
    learning_rate: float = 1e-3  # peak, after a warm-up of 100 steps and before a cosine to zero
    channels: tuple[int, ...] = (24, 48, 96, 128)  # width at 1/1, 1/2, 1/4 and 1/8 of the size
    latent_channels: int = 12
    edge_weight: float = 1.0  # of the error in horizontal and vertical differences
    kl_weight: float = 3e-5  # of the mean Kullback-Leibler divergence of a latent number from a standard normal
    seed: int = 0


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """An untrained AutoencoderKL of 8x compression."""
    torch.manual_seed(recipe.seed)
    depth = len(recipe.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def train_vae(images: np.ndarray, masks: np.ndarray, recipe: VaeRecipe, folder: Path, log=print) -> AutoencoderKL:
    """Train on random crops of `images` uint8 [N,H,W,3]; rare classes of `masks` uint8 [N,H,W] weigh more. Resumes."""
    vae = build_vae(recipe)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    rarity = class_weights(masks)
    start = resume(folder, vae, optimizer, log)
    began = time.monotonic()
    for step in range(start, recipe.steps):
        set_learning_rate(optimizer, recipe.learning_rate, step, recipe.steps)
        image, weight = random_crops(images, masks, rarity, recipe, step)
        posterior = vae.encode(image).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=seeds.generator("vae posterior", recipe.seed, step)
        )
        loss = reconstruction_loss(image, vae.decode(latents).sample, weight, recipe.edge_weight)
        loss = loss + recipe.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - began) / (step + 1 - start)
            log(f"vae step {step + 1}/{recipe.steps} loss {loss.item():.4f} {pace:.2f} s/step")
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            save(folder, step + 1, vae, optimizer)
    return vae.eval()


def random_crops(images, masks, rarity, recipe: VaeRecipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch: crops float32 [B,3,C,C] in [-1,1] and pixel weights [B,1,C,C] with mean about 1."""
    generator = seeds.generator("vae crops", recipe.seed, step)
    high = torch.tensor([len(images), images.shape[1] - recipe.crop + 1, images.shape[2] - recipe.crop + 1])
    picks = (torch.rand((recipe.batch_size, 3), generator=generator) * high).long().tolist()
    size = recipe.crop
    crops = np.stack([images[i, y : y + size, x : x + size] for i, y, x in picks])
    ids = np.stack([masks[i, y : y + size, x : x + size] for i, y, x in picks])
    image = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    return image.contiguous(memory_format=torch.channels_last), rarity[torch.from_numpy(ids).long()][:, None]


def class_weights(masks: np.ndarray) -> torch.Tensor:
    """Weights [256]: one over the square root of a class's share, scaled so that the mean over pixels is 1."""
    share = torch.from_numpy(np.bincount(masks.reshape(-1), minlength=256) / masks.size).float()
    weights = torch.where(share > 0, share.clamp(min=1e-3).rsqrt(), 0)
    return weights / (weights * share).sum()


def reconstruction_loss(image, reconstruction, weight, edge_weight: float) -> torch.Tensor:
    """L1 of the colours [-1,1] plus L1 of neighbour differences, so that edges stay sharp."""
    error = reconstruction - image
    across = (error[..., :, 1:] - error[..., :, :-1]).abs() * weight[..., :, 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    return (error.abs() * weight).mean() + edge_weight * (across.mean() + down.mean()) / 2


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 16) -> None:
    """Fold a shift and scale per channel into the 1x1 convolutions at the bottleneck: latents get mean 0 and std 1.

    So `scaling_factor` is 1 and no channel drowns in the diffusion model's noise. `images`: uint8 [N,H,W,3].
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in pixels.split(batch_size)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[channels:] -= 2 * scale.log()  # a log-variance
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight *= scale[:, None, None]


def set_learning_rate(optimizer, peak: float, step: int, steps: int, warmup: int = 100) -> None:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def save(folder: Path, step: int, model: torch.nn.Module, optimizer) -> None:
    """Commit weights and optimizer as checkpoint-STEP and drop the older one."""

    def write(stage: Path) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, stage / "model.safetensors")
        checkpoint.save_optimizer(optimizer, stage / "optimizer.safetensors")

    checkpoint.commit(folder, f"checkpoint-{step}", write)
    checkpoint.prune(folder, 1)


def resume(folder: Path, model: torch.nn.Module, optimizer, log=print) -> int:
    """Load the newest whole checkpoint into model and optimizer; returns the steps already done, 0 where none is."""
    latest = checkpoint.find_latest(folder, log)
    if latest is None:
        return 0
    model.load_state_dict(load_file(latest / "model.safetensors"))
    checkpoint.load_optimizer(optimizer, latest / "optimizer.safetensors")
    log(f"Resuming from {latest}.")
    return int(latest.name.rsplit("-", 1)[1])
