"""Step 3 of the embedded base: a text encoder and a denoising U-Net, trained together on the autoencoder's latents.

v-prediction (Salimans and Ho 2022, arXiv:2202.00512) with a schedule that ends in pure noise (Lin et al. 2023,
arXiv:2305.08891), so that night scenes can be as dark as they are; a tenth of the captions are left empty for
classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); what is kept is an exponential moving average.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from segcn import seeds
from segcn.samples.learning import Learning, autocast, compiled


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
    """Train on latents [V,N,C,h,w] (V views of N pictures) and tokens [N,L]; returns the moving average. Resumes."""
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
    generator = seeds.generator("unet batch", recipe.seed, step, device=device)
    where = {"generator": generator, "device": device}
    rows = torch.randint(latents.shape[1], size, **where)
    views = torch.randint(latents.shape[0], size, **where)
    dropped = torch.rand(size, **where) < recipe.caption_drop
    clean = latents[views, rows].float()
    ids = torch.where(dropped[:, None], empty, tokens[rows])
    noise = torch.randn(clean.shape, **where)
    return clean, ids, noise, torch.randint(1000, size, **where)
