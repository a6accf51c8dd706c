"""Base models and ControlNets: load, encode, decode, make. The only place that knows the latent scale."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from transformers import CLIPTextModel, CLIPTokenizer

from segcn import frozen
from segcn.devices import WIDE, lay_out
from segcn.errors import UserError

SILU_GAIN = 1.68  # 1 / the root mean square of SiLU of a standard normal
LAYOUT = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass
class Base:
    """A frozen Stable Diffusion: its five parts and where they came from."""

    folder: str
    vae: AutoencoderKL | None  # None once the caches stand and memory is wanted
    vae_config: dict[str, Any]
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    dtype: torch.dtype  # what it computes in; what holds its weights may be narrower, see frozen.py

    @cached_property
    def fingerprint(self) -> str:
        return base_fingerprint(self.folder)

    @property
    def predicts_v(self) -> bool:
        """Whether it predicts v (Stable Diffusion 2.x at 768) rather than noise; UserError for anything else."""
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"{self.folder}/scheduler: expected epsilon or v_prediction, found {kind}")
        return kind == "v_prediction"

    @property
    def latent_factor(self) -> int:
        """Pixels a side of one latent cell."""
        return _factor(self.vae_config)


def load_base(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer_name: str | None = None,
    held: torch.dtype | None = None,
    **hub: str | None,
) -> Base:
    """Load a base in Stable Diffusion 1.x/2.x layout, frozen; the safety checker is never loaded.

    held: what holds the weights of its U-Net; none: `dtype`, as the rest. hub: revision and variant, of a base by name.
    Raises UserError if a part of the layout is missing.
    """
    _check_layout(folder)
    hub = {key: value for key, value in hub.items() if value is not None}
    tokenizer_hub = {key: value for key, value in hub.items() if key != "variant"}
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **hub)
    if held not in (None, dtype):
        frozen.hold(unet, held)
    _leave_file(unet)  # before the other parts are loaded: this is where the most memory is taken
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **hub)
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **hub)
    parts = Base(
        folder=str(folder),
        vae=vae,
        vae_config=dict(vae.config),
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(folder, tokenizer_name, tokenizer_hub),
        unet=unet,
        scheduler=DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **tokenizer_hub),
        dtype=dtype,
    )
    for part in (vae, text_encoder, unet):
        part.requires_grad_(False).eval().to(device)
    for part in (vae, unet):
        lay_out(part, device)
    return parts


def _leave_file(part: torch.nn.Module) -> None:
    """Copy weights out of the file that they are mapped from: while one is left there, all of it counts as ours."""
    for parameter in part.parameters():
        parameter.data = parameter.data.clone()


def latent_factor(folder: str | Path) -> int:
    """Pixels a side of one latent cell of a base whose weights need not be loaded for it."""
    _check_layout(folder)
    return _factor(AutoencoderKL.load_config(folder, subfolder="vae"))


def _factor(vae_config: dict[str, Any]) -> int:
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def load_tokenizer(folder: str | Path, name: str | None = None, hub: dict | None = None) -> CLIPTokenizer:
    """The base's tokenizer, or another one by name."""
    where = {} if name else {"subfolder": "tokenizer"}
    return CLIPTokenizer.from_pretrained(name or folder, **where, **(hub or {}))


def base_fingerprint(folder: str | Path) -> str:
    """16 hexadecimal digits that change with any config's text and any training of the weights, or a hub's name."""
    digest = hashlib.sha256() if Path(folder).is_dir() else hashlib.sha256(str(folder).encode())
    for path in sorted(Path(folder).glob("*/*")):
        if path.parent.name in LAYOUT and path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + _sampled(path))
    return digest.hexdigest()[:16]


def _sampled(path: Path, blocks: int = 64, block: int = 2**16) -> bytes:
    """A file's size and, of a file over 4 MiB, evenly spaced blocks of 64 KiB: gigabytes are told apart at once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= blocks * block:
            return file.read()
        content = str(size).encode()
        for number in range(blocks):
            file.seek((size - block) * number // (blocks - 1))
            content += file.read(block)
    return content


def weights_digest(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode_moments(vae: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    """image [B,3,H,W] in [-1,1] -> the posterior's mean and log-variance, [B,2C,h,w]."""
    with torch.no_grad():
        return vae.encode(image.to(vae.device, vae.dtype)).latent_dist.parameters


def sample_latents(vae_config: dict[str, Any], moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw scaled latents [B,C,h,w] from moments [B,2C,h,w] and standard normal noise [B,C,h,w]."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(-30, 20))
    return (mean + std * noise) * vae_config["scaling_factor"]


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents [B,C,h,w] -> image [B,3,H,W] in about [-1,1]."""
    with torch.no_grad():
        return vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample.float()


def reconstruct(vae: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    """image [B,3,H,W] in [-1,1] through the autoencoder's posterior mean and back: the best any latent model can do."""
    mean = encode_moments(vae, image).chunk(2, dim=1)[0]
    return decode(vae, mean * vae.config.scaling_factor)


def encode_text(base: Base, captions: list[str]) -> torch.Tensor:
    """Captions -> embeddings [B,L,D], cut at the tokenizer's length L."""
    assert base.text_encoder is not None
    tokens = base.tokenizer(
        captions,
        padding="max_length",
        max_length=base.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return base.text_encoder(tokens.input_ids.to(base.text_encoder.device))[0]


def make_controlnet(unet: UNet2DConditionModel, latent_factor: int = 8) -> ControlNetModel:
    """A ControlNet that starts as a copy of the U-Net's encoder (Zhang et al. 2023, arXiv:2302.05543).

    UserError unless latent_factor, the pixels a side of a latent cell, is 8.
    """
    if latent_factor != 8:
        raise UserError(
            "--pretrained_model_name_or_path: expected an autoencoder that compresses 8x, as a ControlNet in diffusers"
            f" does, found {latent_factor}x"
        )
    narrow = unet.config.block_out_channels[0] < WIDE  # an embedding as small as its U-Net
    embedding = (16, 32, 64, 96) if narrow else (16, 32, 96, 256)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=embedding)
    carry_masks(controlnet.controlnet_cond_embedding)
    return lay_out(controlnet, unet.device)


def carry_masks(embedding: ControlNetConditioningEmbedding) -> None:
    """Initialise all but the last convolution to keep a signal's spread (He et al. 2015, arXiv:1502.01852, for SiLU).

    PyTorch's own initialisation fades what tells two masks apart to less than a thousandth, and a training is deaf to
    masks until it has undone that. The last convolution stays zero: the ControlNet still begins as the U-Net's encoder.
    """
    for convolution in (embedding.conv_in, *embedding.blocks):
        torch.nn.init.normal_(convolution.weight, std=SILU_GAIN / math.sqrt(convolution.weight[0].numel()))
        torch.nn.init.zeros_(convolution.bias)


def load_controlnet(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """A ControlNet, from a folder as diffusers writes it or by its name on the hub; UserError if there is none."""
    try:
        return lay_out(ControlNetModel.from_pretrained(folder, torch_dtype=dtype), device)
    except OSError as error:
        raise UserError(
            f"{folder}: expected a ControlNet (config.json and diffusion_pytorch_model.safetensors), found none in such"
            f" a folder, nor on the hub ({str(error).splitlines()[0]})"
        ) from None


def _check_layout(folder: str | Path) -> None:
    """A local folder must have every part; a hub name is diffusers' to resolve."""
    folder = Path(folder)
    missing = [part for part in LAYOUT if not (folder / part).is_dir()]
    looks_local = folder.exists() or folder.is_absolute() or str(folder).startswith(".")
    if missing and looks_local:
        found = "no such folder" if not folder.exists() else f"no {missing[0]}/ in it"
        raise UserError(
            f"--pretrained_model_name_or_path {folder}: expected a Stable Diffusion folder with "
            f"{', '.join(part + '/' for part in LAYOUT)}, found {found}"
        )
