"""The two trainings of the embedded base: its autoencoder, and its text encoder with its U-Net.

Both resume from checkpoints; every batch is a function of (seed, step) alone.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from segcn.data.dataset import to_image
from segcn.train import checkpoint
from segcn.utils import io, rng
from segcn.utils.progress import Progress

SAVE_EVERY = 300  # seconds
WARMUP = 100  # steps
POSTERIOR_STD = 0.01  # of standardized latents
Log = Callable[[str], None]


@dataclass(frozen=True)
class VaeRecipe:
    """The embedded base's autoencoder, and how it is trained."""

    steps: int = 7000  # optimizer steps
    batch_size: int = 32  # crops in each step
    crop: int = 128  # size of a crop in pixels
    learning_rate: float = 2e-3  # peak, after a warm-up of 100 steps and before a cosine to zero
    channels: tuple[int, ...] = (24, 48, 96, 128)  # width at 1/1, 1/2, 1/4 and 1/8 of the size
    latent_channels: int = 12
    edge_weight: float = 1.0  # of the error in horizontal and vertical differences
    kl_weight: float = 3e-4  # of the mean Kullback-Leibler divergence of a latent number from a standard normal
    seed: int = 0


@dataclass(frozen=True)
class UnetRecipe:
    """The embedded base's U-Net and text encoder, and how they are trained."""

    steps: int = 15300  # optimizer steps
    batch_size: int = 256  # latents in each step
    learning_rate: float = 1e-3  # peak, after a warm-up of 100 steps and before a cosine to zero
    channels: tuple[int, ...] = (96, 128, 160)  # width at 16 x 16, 8 x 8 and 4 x 4 latents
    text_width: int = 128
    text_layers: int = 3
    caption_drop: float = 0.1  # share of captions left empty
    ema_decay: float = 0.999
    seed: int = 0


class Learning:
    """Steps of AdamW over `model`, whose `recipe` says how many and at what rate; resumes from `folder`."""

    def __init__(self, name: str, model: torch.nn.Module, recipe, folder: Path, log: Log, **adamw):
        self.name, self.model, self.recipe, self.folder, self.log = name, model, recipe, folder, log
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, fused=True, **adamw)
        self.losses: list[torch.Tensor] = []  # of the last steps; read only when they are logged

    def steps(self) -> Iterator[int]:
        """The steps that are left; logs and commits a checkpoint now and then, and at the end.

        The learning rate: a linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983).
        """
        start, total = self.resume(), self.recipe.steps
        progress, saved = Progress(f"{self.name}: steps", total, self.log, start=start), time.monotonic()
        for step in range(start, total):
            cosine = 0.5 * (1 + math.cos(math.pi * step / total))
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * min(1.0, (step + 1) / WARMUP) * cosine
            yield step
            done, now = step + 1, time.monotonic()
            progress(done, self.mean_loss)
            if done == total:
                self.log(f"{self.name}: {total} steps, {self.mean_loss()}")
            if now - saved > SAVE_EVERY or done == total:
                io.commit(self.folder, f"checkpoint-{done}", self.save)
                checkpoint.prune(self.folder, 1)
                saved = time.monotonic()

    def mean_loss(self) -> str:
        """The mean loss since it was asked for last."""
        losses, self.losses = self.losses or [torch.tensor(math.nan)], []
        return f"loss {torch.stack(losses).mean().item():.4f}"

    def descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient, its norm clipped at 1."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def save(self, folder: Path) -> None:
        """Write weights and optimizer."""
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, folder / "model.safetensors")
        checkpoint.save_optimizer(self.optimizer, folder / "optimizer.safetensors")

    def resume(self) -> int:
        """Load the newest complete checkpoint; returns the steps already done, 0 where there is none."""
        latest = checkpoint.find_latest(self.folder, self.log)
        if latest is None:
            return 0
        self.model.load_state_dict(load_file(latest / "model.safetensors"))
        checkpoint.load_optimizer(self.optimizer, latest / "optimizer.safetensors")
        self.log(f"Resuming from {latest}.")
        return int(latest.name.rsplit("-", 1)[1])


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(function: Callable, device: torch.device, mode: str = "default") -> Callable:
    """Compiled where it pays, on a GPU; "reduce-overhead" makes CUDA graphs, for many small kernels."""
    return torch.compile(function, mode=mode) if device.type == "cuda" else function


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in [-1,1], stored channels last."""
    return to_image(images.permute(0, 3, 1, 2))


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """An untrained AutoencoderKL of 8x compression: Stable Diffusion's (arXiv:2112.10752), narrow enough for a CPU."""
    torch.manual_seed(recipe.seed)
    depth = len(recipe.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=recipe.channels, layers_per_block=1, latent_channels=recipe.latent_channels,
        norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip
    return vae.to(memory_format=torch.channels_last)


def train_vae(images: torch.Tensor, masks: torch.Tensor, recipe: VaeRecipe, folder: Path, log: Log) -> AutoencoderKL:
    """Train on crops of `images` uint8 [N,H,W,3], on their device; rare classes of `masks` uint8 [N,H,W] weigh more."""
    device = images.device
    vae = build_vae(recipe).to(device)
    rarity = rarity_weights(masks)

    def forward(image: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(image).latent_dist
        divergence = posterior.kl().mean() / noise[0].numel()
        return vae.decode(posterior.mean + posterior.std * noise).sample, divergence

    forward = compiled(forward, device)
    learning = Learning("vae", vae, recipe, folder, log, betas=(0.9, 0.99))
    size = recipe.crop // 2 ** (len(recipe.channels) - 1)
    for step in learning.steps():
        image, weight = random_crops(images, masks, rarity, recipe, step)
        generator = rng.generator("vae posterior", recipe.seed, step, device=device)
        shape = (recipe.batch_size, recipe.latent_channels, size, size)
        with autocast(device):
            reconstruction, divergence = forward(image, torch.randn(shape, generator=generator, device=device))
        loss = reconstruction_loss(image, reconstruction, weight, recipe.edge_weight)
        learning.descend(loss + recipe.kl_weight * divergence)
    return vae.eval()


def random_crops(images, masks, rarity, recipe: VaeRecipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch: crops float32 [B,3,C,C] in [-1,1] and pixel weights [B,1,C,C] with mean about 1."""
    device, size = images.device, recipe.crop
    generator = rng.generator("vae crops", recipe.seed, step, device=device)
    high = torch.tensor([len(images), images.shape[1] - size + 1, images.shape[2] - size + 1], device=device)
    picks = (torch.rand((recipe.batch_size, 3), generator=generator, device=device) * high).long()
    row, top, left = picks[:, 0, None, None], picks[:, 1, None, None], picks[:, 2, None, None]
    pixels = torch.arange(size, device=device)
    place = (row, top + pixels[:, None], left + pixels)  # [B,1,1], [B,C,1], [B,1,C]
    return to_pixels(images[place]), rarity[masks[place].long()][:, None]


def rarity_weights(masks: torch.Tensor) -> torch.Tensor:
    """Weights [256]: one over the square root of a class's share, scaled so that the mean over pixels is 1."""
    counted = (torch.bincount(part.flatten().long(), minlength=256) for part in masks.split(1024))
    counts = sum(counted, start=torch.tensor(0))
    share = counts.float() / masks.numel()
    weights = torch.where(share > 0, share.clamp(min=1e-3).rsqrt(), 0)
    return weights / (weights * share).sum()


def reconstruction_loss(image, reconstruction, weight, edge_weight: float) -> torch.Tensor:
    """L1 of the colors plus L1 of neighbor differences: edges stay sharp without a downloaded perceptual network."""
    error = reconstruction - image
    across = (error[..., :, 1:] - error[..., :, :-1]).abs() * weight[..., :, 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    return (error.abs() * weight).mean() + edge_weight * (across.mean() + down.mean()) / 2


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold a shift and scale per channel into the 1x1 convolutions at the bottleneck: latents get mean 0 and std 1.

    So `scaling_factor` is 1 and no channel drowns in the diffusion model's noise. The posterior becomes narrow
    (`POSTERIOR_STD`): in a channel that the decoder leaves unused it is many times wider than its means, and a
    ControlNet trained on samples of it would learn from little else. `images`: uint8 [N,H,W,3].
    """
    means = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean for batch in images.split(16)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.weight[channels:] = 0
    quant.bias[channels:] = 2 * math.log(POSTERIOR_STD)  # a log-variance
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight *= scale[:, None, None]


class Denoiser(torch.nn.Module):
    """The two parts that learn together: tokens [B,L] -> embeddings -> v [B,C,h,w].

    Text enters the U-Net at 8 x 8 and 4 x 4 latents, where it is cheap.
    """

    def __init__(self, recipe: UnetRecipe, latent_channels: int, tokenizer: CLIPTokenizer):
        super().__init__()
        torch.manual_seed(recipe.seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=recipe.text_width, intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width, num_hidden_layers=recipe.text_layers, num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        self.text_encoder = CLIPTextModel(text)
        depth = len(recipe.channels)
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=latent_channels, out_channels=latent_channels,
            block_out_channels=recipe.channels, layers_per_block=1, cross_attention_dim=recipe.text_width,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (depth - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (depth - 1) + ("UpBlock2D",),
            attention_head_dim=4, norm_num_groups=16,
        )  # fmt: skip
        self.unet = unet.to(memory_format=torch.channels_last)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timestep, self.text_encoder(tokens)[0]).sample


class WithAverage(torch.nn.Module):
    """The model that learns and its exponential moving average, stored together."""

    def __init__(self, model: Denoiser, decay: float):
        super().__init__()
        self.live = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


def build_scheduler() -> DDPMScheduler:
    """1,000 steps, v-prediction, the last of them pure noise."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, steps_offset=1,
    )  # fmt: skip


def train_denoiser(
    latents: torch.Tensor, tokens: torch.Tensor, tokenizer: CLIPTokenizer, recipe: UnetRecipe, folder: Path, log: Log
) -> Denoiser:
    """Train on latents [V,N,C,h,w] (V views of N images) and tokens [N,L]; returns the moving average.

    v-prediction (Salimans and Ho 2022, arXiv:2202.00512) with a schedule that ends in pure noise (Lin et al. 2023,
    arXiv:2305.08891), so that night scenes can be as dark as they are; a tenth of the captions are left empty for
    classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
    """
    device = latents.device
    pair = WithAverage(Denoiser(recipe, latents.shape[2], tokenizer), recipe.ema_decay).to(device)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0].to(device)
    scheduler = build_scheduler()
    learning = Learning("unet", pair, recipe, folder, log)
    denoise = compiled(pair.live, device, "reduce-overhead")
    for step in learning.steps():
        clean, ids, noise, timestep = draw_batch(latents, tokens, empty, recipe, step)
        with autocast(device):
            prediction = denoise(scheduler.add_noise(clean, noise, timestep), timestep, ids)
        target = scheduler.get_velocity(clean, noise, timestep)
        learning.descend(F.mse_loss(prediction.float(), target))
        pair.average.update_parameters(pair.live)
    average = pair.average.module.eval()
    assert isinstance(average, Denoiser)
    return average


def draw_batch(latents, tokens, empty, recipe: UnetRecipe, step: int):
    """Clean latents [B,C,h,w], tokens [B,L], noise [B,C,h,w] and timesteps [B] of a step."""
    device, size = latents.device, (recipe.batch_size,)
    generator = rng.generator("unet batch", recipe.seed, step, device=device)
    where = {"generator": generator, "device": device}
    rows = torch.randint(latents.shape[1], size, **where)
    views = torch.randint(latents.shape[0], size, **where)
    dropped = torch.rand(size, **where) < recipe.caption_drop
    clean = latents[views, rows].float()
    ids = torch.where(dropped[:, None], empty, tokens[rows])
    noise = torch.randn(clean.shape, **where)
    return clean, ids, noise, torch.randint(1000, size, **where)
