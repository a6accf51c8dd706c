"""Which device computes, and how networks and memory are laid out for it."""

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from segcn.utils.errors import UserError

# --- devices: Which device computes, and how networks and memory are laid out for it.

if TYPE_CHECKING:
    from diffusers import ModelMixin
WIDE = 320  # channels of the first block: Stable Diffusion's
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # the names of mallopt(3)


def pick_device(name: str | None = None) -> str:
    """The device of that name; none: a GPU where there is one, else the CPU."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory(device: str | torch.device = "cpu") -> bool:
    """Let a process that computes on the CPU keep the memory that it frees; whether its C library (glibc) can.

    Otherwise each step gives its tensors' pages back to the system and has them cleared anew, which takes up to a third
    of a CPU's time; `segcn bench step` measures it. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if torch.device(device).type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))


def give_freed_memory_back() -> None:
    """Return to the system what was kept until now, so that a peak can be measured from here."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def lay_out(network: "ModelMixin", device: str | torch.device) -> "ModelMixin":
    """Move a network of diffusers to a device, its weights in the order in which convolutions are fastest there.

    That is channels_last, but for wide networks on CPUs (`segcn bench step` measures it).
    """
    wide_on_cpu = torch.device(device).type == "cpu" and network.config.block_out_channels[0] >= WIDE
    layout = torch.contiguous_format if wide_on_cpu else torch.channels_last
    return network.to(device, memory_format=layout)


@contextlib.contextmanager
def one_core() -> Iterator[int]:
    """Compute on one core for as long as the block lasts, as sums depend on how they are split; the cores there are."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


# --- frozen: Frozen weights held in half precision and computed with in the precision of what comes in.
#
# A frozen convolution or linear layer needs nothing but its weight for the gradient of its input. Held in bfloat16 or
# float16, the weight is widened when it is used, once forwards and once backwards, so that no wide copy stays alive
# between the two. Normalisations stay as they are.

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU_FLAGS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def computes_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies in this precision by itself; a V100 and most CPUs emulate bfloat16, slowly."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(flag) for flag in CPU_FLAGS[dtype])


def precisions(frozen: str | None, mixed: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What holds the frozen weights and what they compute in, for --frozen_precision and --mixed_precision.

    Computed is in --mixed_precision where the device is fast in it, and in float32 where it is not or where the
    weights are held so.
    """
    held, computed = DTYPES[frozen or mixed], DTYPES[mixed]
    exact = held == torch.float32 or not computes_fast(computed, device)
    return held, torch.float32 if exact else computed


def hold(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold the convolutions and linear layers of a frozen network in `dtype`; returns the network."""
    for layer in network.modules():
        if type(layer) in HELD:
            layer.__class__ = HELD[type(layer)]
            layer.to(dtype)
    return network


class HeldLinear(nn.Linear):
    """A frozen linear layer that widens its weight when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, self.weight, self.bias)


class HeldConv2d(nn.Conv2d):
    """A frozen convolution that widens its weight when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Convolution.apply(x, self.weight, self.bias, (self.stride, self.padding, self.dilation, self.groups))


HELD = {nn.Linear: HeldLinear, nn.Conv2d: HeldConv2d}


def _as(x: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, _as(x, weight), _as(x, bias))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ _as(gradient, ctx.saved_tensors[0]), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape, geometry
        return F.conv2d(x, _as(x, weight), _as(x, bias), *geometry)

    @staticmethod
    def backward(ctx, gradient):
        weight = _as(gradient, ctx.saved_tensors[0])
        return torch.nn.grad.conv2d_input(ctx.size, weight, gradient, *ctx.geometry), None, None, None


# --- models: Base models and ControlNets: load, encode, decode, make. The only place that knows the latent scale.

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
        hold(unet, held)
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
