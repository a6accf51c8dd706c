"""What both trainings of the embedded base share: the schedule, one descent, progress, checkpoints, the device."""

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

from segcn.train import checkpoint
from segcn.utils import io, rng

# --- samples.learning: What both trainings of the embedded base share: the schedule, one descent, progress, checkpoints, the device.

SAVE_EVERY = 300  # seconds
LOG_EVERY = 100  # steps


class Learning:
    """Steps of AdamW over `model`, whose `recipe` says how many and at what rate; resumes from `folder`."""

    def __init__(self, name: str, model: torch.nn.Module, recipe, folder: Path, log: Callable[[str], None], **adamw):
        self.name, self.model, self.recipe, self.folder, self.log = name, model, recipe, folder, log
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, fused=True, **adamw)
        self.losses: list[torch.Tensor] = []  # of the last steps; read only when they are logged

    def steps(self) -> Iterator[int]:
        """The steps that are left; logs and commits a checkpoint now and then, and at the end."""
        start, total = self.resume(), self.recipe.steps
        began = saved = time.monotonic()
        for step in range(start, total):
            set_learning_rate(self.optimizer, self.recipe.learning_rate, step, total)
            yield step
            done, now = step + 1, time.monotonic()
            if done % LOG_EVERY == 0 or done == total:
                loss = torch.stack(self.losses).mean().item()
                pace = (now - began) / (done - start)
                self.log(f"{self.name} step {done}/{total} loss {loss:.4f} {pace:.3f} s/step")
                self.losses.clear()
            if now - saved > SAVE_EVERY or done == total:
                self.save(done)
                saved = time.monotonic()

    def descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient, its norm clipped at 1."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def save(self, step: int) -> None:
        """Commit weights and optimizer as checkpoint-STEP and drop the older one."""

        def write(stage: Path) -> None:
            save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, stage / "model.safetensors")
            checkpoint.save_optimizer(self.optimizer, stage / "optimizer.safetensors")

        io.commit(self.folder, f"checkpoint-{step}", write)
        checkpoint.prune(self.folder, 1)

    def resume(self) -> int:
        """Load the newest whole checkpoint; returns the steps already done, 0 where none is."""
        latest = checkpoint.find_latest(self.folder, self.log)
        if latest is None:
            return 0
        self.model.load_state_dict(load_file(latest / "model.safetensors"))
        checkpoint.load_optimizer(self.optimizer, latest / "optimizer.safetensors")
        self.log(f"Resuming from {latest}.")
        return int(latest.name.rsplit("-", 1)[1])


def set_learning_rate(optimizer, peak: float, step: int, steps: int, warmup: int = 100) -> None:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(function: Callable, device: torch.device, mode: str = "default") -> Callable:
    """Compiled where it pays, on a GPU; "reduce-overhead" makes CUDA graphs, for many small kernels."""
    return torch.compile(function, mode=mode) if device.type == "cuda" else function


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in [-1,1], stored channels last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- samples.unet: Step 3 of the embedded base: a text encoder and a denoising U-Net, trained together on the autoencoder's latents.
#
# v-prediction (Salimans and Ho 2022, arXiv:2202.00512) with a schedule that ends in pure noise (Lin et al. 2023,
# arXiv:2305.08891), so that night scenes can be as dark as they are; a tenth of the captions are left empty for
# classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); what is kept is an exponential moving average.


@dataclass(frozen=True)
class UnetRecipe:
    """The embedded base's U-Net and text encoder, and how they are trained."""

    steps: int = 15300  # optimizer steps
    batch_size: int = 256  # latents a step
    learning_rate: float = 1e-3  # peak, after a warm-up of 100 steps and before a cosine to zero
    channels: tuple[int, ...] = (96, 128, 160)  # width at 16 x 16, 8 x 8 and 4 x 4 latents
    text_width: int = 128
    text_layers: int = 3
    caption_drop: float = 0.1  # share of captions left empty
    ema_decay: float = 0.999
    seed: int = 0


class Denoiser(torch.nn.Module):
    """The two parts that learn together: tokens [B,L] -> embeddings -> v [B,C,h,w]."""

    def __init__(self, recipe: UnetRecipe, latent_channels: int, tokenizer: CLIPTokenizer):
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.text_encoder = build_text_encoder(recipe, tokenizer)
        self.unet = build_unet(recipe, latent_channels).to(memory_format=torch.channels_last)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timestep, self.text_encoder(tokens)[0]).sample


def build_text_encoder(recipe: UnetRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of the tokenizer's size."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(recipe: UnetRecipe, latent_channels: int) -> UNet2DConditionModel:
    """An untrained UNet2DConditionModel; text enters at 8 x 8 and 4 x 4 latents, where it is cheap."""
    depth = len(recipe.channels)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (depth - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (depth - 1) + ("UpBlock2D",),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDPMScheduler:
    """1,000 steps, v-prediction, the last of them pure noise."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def train_denoiser(
    latents: torch.Tensor,
    tokens: torch.Tensor,
    tokenizer: CLIPTokenizer,
    recipe: UnetRecipe,
    folder: Path,
    log=print,
) -> Denoiser:
    """Train on latents [V,N,C,h,w] (V views of N images) and tokens [N,L]; returns the moving average. Resumes."""
    device = latents.device
    pair = Pair(Denoiser(recipe, latents.shape[2], tokenizer), recipe.ema_decay).to(device)
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


class Pair(torch.nn.Module):
    """The model that learns and its exponential moving average, stored together."""

    def __init__(self, model: Denoiser, decay: float):
        super().__init__()
        self.live = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


def draw_batch(latents, tokens, empty, recipe: UnetRecipe, step: int):
    """Clean latents [B,C,h,w], tokens [B,L], noise and timesteps [B] of a step: a function of (seed, step) alone."""
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


# --- samples.vae: Step 1 of the embedded base: an autoencoder that turns an image into 12 channels at an eighth of its size.
#
# The network is Stable Diffusion's own (Rombach et al. 2022, arXiv:2112.10752), narrow enough for a laptop; the loss
# keeps edges instead of asking a downloaded perceptual network.

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
    generator = rng.generator("vae posterior", recipe.seed, step, device=device)
    side = recipe.crop // 2 ** (len(recipe.channels) - 1)
    return torch.randn((recipe.batch_size, recipe.latent_channels, side, side), generator=generator, device=device)


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


def class_weights(masks: torch.Tensor) -> torch.Tensor:
    """Weights [256]: one over the square root of a class's share, scaled so that the mean over pixels is 1."""
    counted = (torch.bincount(part.flatten().long(), minlength=256) for part in masks.split(1024))
    counts = sum(counted, start=torch.tensor(0))
    share = counts.float() / masks.numel()
    weights = torch.where(share > 0, share.clamp(min=1e-3).rsqrt(), 0)
    return weights / (weights * share).sum()


def reconstruction_loss(image, reconstruction, weight, edge_weight: float) -> torch.Tensor:
    """L1 of the colors [-1,1] plus L1 of neighbour differences, so that edges stay sharp."""
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
