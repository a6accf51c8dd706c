"""Step 1 of the embedded base: an autoencoder that turns a picture into 12 channels at an eighth of its size.

The network is Stable Diffusion's own (Rombach et al. 2022, arXiv:2112.10752), narrow enough for a laptop; the loss
keeps edges instead of asking a downloaded perceptual network.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from segcn import seeds
from segcn.samples.learning import Learning, autocast, compiled, to_pixels

POSTERIOR_STD = 0.01  # of standardised latents


@dataclass(frozen=True)
class VaeRecipe:
    """The embedded base's autoencoder, and how it is trained."""

    steps: int = 7000  # optimizer steps
    batch_size: int = 32  # crops a step
    crop: int = 128  # pixels a side
    learning_rate: float = 2e-3  # peak, after a warm-up of 100 steps and before a cosine to zero
    channels: tuple[int, ...] = (24, 48, 96, 128)  # width at 1/1, 1/2, 1/4 and 1/8 of the size
    latent_channels: int = 12
    edge_weight: float = 1.0  # of the error in horizontal and vertical differences
    kl_weight: float = 3e-4  # of the mean Kullback-Leibler divergence of a latent number from a standard normal
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


def train_vae(images: torch.Tensor, masks: torch.Tensor, recipe: VaeRecipe, folder: Path, log=print) -> AutoencoderKL:
    """Train on crops of `images` uint8 [N,H,W,3], on their device; rare classes of `masks` uint8 [N,H,W] weigh more.

    Resumes from `folder`.
    """
    device = images.device
    vae = build_vae(recipe).to(device)
    rarity = class_weights(masks)

    def forward(image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(image).latent_dist
        divergence = posterior.kl().mean() / noise[0].numel()
        return vae.decode(posterior.mean + posterior.std * noise).sample, divergence

    forward = compiled(forward, device)
    learning = Learning("vae", vae, recipe, folder, log, betas=(0.9, 0.99))
    for step in learning.steps():
        image, weight = random_crops(images, masks, rarity, recipe, step)
        with autocast(device):
            reconstruction, divergence = forward(image, posterior_noise(recipe, step, device))
        loss = reconstruction_loss(image, reconstruction, weight, recipe.edge_weight)
        learning.descend(loss + recipe.kl_weight * divergence)
    return vae.eval()


def posterior_noise(recipe: VaeRecipe, step: int, device: torch.device) -> torch.Tensor:
    """Standard normal [B,C,c,c] for the latents of a step's crops."""
    generator = seeds.generator("vae posterior", recipe.seed, step, device=device)
    side = recipe.crop // 2 ** (len(recipe.channels) - 1)
    return torch.randn((recipe.batch_size, recipe.latent_channels, side, side), generator=generator, device=device)


def random_crops(images, masks, rarity, recipe: VaeRecipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch: crops float32 [B,3,C,C] in [-1,1] and pixel weights [B,1,C,C] with mean about 1."""
    device, size = images.device, recipe.crop
    generator = seeds.generator("vae crops", recipe.seed, step, device=device)
    high = torch.tensor([len(images), images.shape[1] - size + 1, images.shape[2] - size + 1], device=device)
    picks = (torch.rand((recipe.batch_size, 3), generator=generator, device=device) * high).long()
    row, top, left = picks[:, 0, None, None], picks[:, 1, None, None], picks[:, 2, None, None]
    pixels = torch.arange(size, device=device)
    place = (row, top + pixels[:, None], left + pixels)  # [B,1,1], [B,C,1], [B,1,C]
    return to_pixels(images[place]), rarity[masks[place].long()][:, None]


def class_weights(masks: torch.Tensor) -> torch.Tensor:
    """Weights [256]: one over the square root of a class's share, scaled so that the mean over pixels is 1."""
    counted = (torch.bincount(part.flatten().long(), minlength=256) for part in masks.split(1024))
    counts = sum(counted, start=torch.tensor(0))
    share = counts.float() / masks.numel()
    weights = torch.where(share > 0, share.clamp(min=1e-3).rsqrt(), 0)
    return weights / (weights * share).sum()


def reconstruction_loss(image, reconstruction, weight, edge_weight: float) -> torch.Tensor:
    """L1 of the colours [-1,1] plus L1 of neighbour differences, so that edges stay sharp."""
    error = reconstruction - image
    across = (error[..., :, 1:] - error[..., :, :-1]).abs() * weight[..., :, 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    return (error.abs() * weight).mean() + edge_weight * (across.mean() + down.mean()) / 2


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 16) -> None:
    """Fold a shift and scale per channel into the 1x1 convolutions at the bottleneck: latents get mean 0 and std 1.

    So `scaling_factor` is 1 and no channel drowns in the diffusion model's noise. The posterior becomes narrow
    (`POSTERIOR_STD`): in a channel that the decoder leaves unused it is many times wider than its means, and a
    ControlNet trained on samples of it would hear little else. `images`: uint8 [N,H,W,3].
    """
    batches = images.split(batch_size)
    means = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean for batch in batches])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.weight[channels:] = 0
    quant.bias[channels:] = 2 * math.log(POSTERIOR_STD)  # a log-variance
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight *= scale[:, None, None]
