"""Frozen base models in Stable Diffusion's layout: load, encode, decode; devices and half precision.

This is the only file that knows the scale of the latents. What distinguishes Stable Diffusion 1.x, 2.x, XL and 3 is in
`family`, `noise` and `text`: everything else asks the `Base`."""

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, ModelMixin
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from segcn.models.family import FLAG, PART_FOLDERS, Family, Residuals, family_of, index_of, parts_needed
from segcn.models.lora import fuse_lora, lora_file
from segcn.models.noise import Diffusion
from segcn.models.text import TextEncoders, load_text_encoder, tokenize
from segcn.utils.errors import UserError

WIDE = 320  # channels of the first block of Stable Diffusion's U-Net
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU_FLAGS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


# Devices


def pick_device(name: str | None = None) -> str:
    """The device of that name; none: a GPU where there is one, else the CPU."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory(device: str | torch.device = "cpu") -> bool:
    """Let a process that computes on the CPU keep the memory that it frees; whether its C library (glibc) can.

    Otherwise each step returns the memory of its tensors to the system, which clears it before the next step: up to a
    third of the time on a CPU. https://man7.org/linux/man-pages/man3/mallopt.3.html
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


def lay_out(network: ModelMixin, device: str | torch.device) -> ModelMixin:
    """Move a network of diffusers to a device, in the memory format in which convolutions are fastest there.

    That is channels_last, except for wide networks on CPUs and for transformers.
    """
    widths = network.config.get("block_out_channels")  # of a network of convolutions
    contiguous = widths is None or (torch.device(device).type == "cpu" and widths[0] >= WIDE)
    return network.to(device, memory_format=torch.contiguous_format if contiguous else torch.channels_last)


@contextlib.contextmanager
def one_core() -> Iterator[int]:
    """Compute on one core inside the block, as sums depend on how they are split; yields the number of cores."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


# Half precision
#
# For the gradient of its input, a frozen convolution or linear layer needs nothing but its weight. Stored in bfloat16
# or float16, the weight is converted to the input's precision when it is used, once in the forward and once in the
# backward pass, so that no wide copy is kept between them. Normalizations stay in float32.


def precisions(frozen: str | None, mixed: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """In what the frozen weights are stored and in what they compute, for --frozen_precision and --mixed_precision.

    They compute in --mixed_precision where the device is fast in it, and in float32 where it is not or where the
    weights are stored so.
    """
    stored, computed = DTYPES[frozen or mixed], DTYPES[mixed]
    exact = stored == torch.float32 or not computes_fast(computed, device)
    return stored, torch.float32 if exact else computed


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


def hold(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store the convolutions and linear layers of a frozen network in `dtype`; returns the network."""
    for layer in network.modules():
        if type(layer) in HELD:
            layer.__class__ = HELD[type(layer)]
            layer.to(dtype)
    return network


class HeldLinear(nn.Linear):
    """A frozen linear layer whose weight is converted when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Convert.apply(x, self.weight, self.bias, None)


class HeldConv2d(nn.Conv2d):
    """A frozen convolution whose weight is converted when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Convert.apply(x, self.weight, self.bias, (self.stride, self.padding, self.dilation, self.groups))


HELD = {nn.Linear: HeldLinear, nn.Conv2d: HeldConv2d}


class _Convert(torch.autograd.Function):
    """A convolution of that geometry or, without one, a linear layer; only its input gets a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape, geometry
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight, bias, *geometry) if geometry else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.saved_tensors[0].to(gradient.dtype)
        if ctx.geometry is None:
            return gradient @ weight, None, None, None
        return nn.grad.conv2d_input(ctx.size, weight, gradient, *ctx.geometry), None, None, None


# The base model


@dataclass
class Base:
    """A frozen Stable Diffusion: its parts and where they came from."""

    folder: str
    family: Family
    vae: AutoencoderKL | None  # None once the caches are complete and memory is needed
    vae_config: dict[str, Any]
    text_encoder: CLIPTextModel | TextEncoders | None
    tokenizer: CLIPTokenizer
    unet: Any  # the network that denoises: a U-Net, or the transformer of Stable Diffusion 3
    scheduler: Any  # its noise schedule, which `process` applies
    dtype: torch.dtype  # in which it computes; its weights may be stored in a narrower one, see `hold`
    lora: str | None = None  # what was added to its weights
    zeros_without_prompt: bool = False  # it was trained with zeros, not with the empty text's embedding

    @cached_property
    def fingerprint(self) -> str:
        return base_fingerprint(self.folder, self.lora)

    @property
    def process(self) -> Diffusion:
        """How latents become noise, and what it predicts."""
        return self.family.process(self.scheduler, self.folder)

    @property
    def latent_factor(self) -> int:
        """The width of a latent cell in pixels, 8 in Stable Diffusion."""
        return _factor(self.vae_config)

    @property
    def side_factor(self) -> int:
        """What the sides of images must be multiples of, in pixels: 8 in Stable Diffusion, 16 in 3."""
        return self.latent_factor * self.family.cell(self.unet)

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def reads_sizes(self) -> bool:
        """Whether it reads the sizes of images: Stable Diffusion XL."""
        return self.family.reads_sizes

    @property
    def text_shape(self) -> tuple[int, int]:
        """(L,D) of the embedding of a caption, as `encode_text` gives it."""
        return self.family.text_shape(self.unet, self.tokenizer.model_max_length)

    def conditions(self, text: torch.Tensor, sizes: torch.Tensor | tuple[int, int] | None) -> dict[str, Any]:
        """What its network and a ControlNet take besides latents and timestep, by diffusers' names.

        text: [B,L,D] of `encode_text`. sizes: [B,6] of `size_ids`, or (height, width) of images that are not cut out of
        larger ones; only a base that reads sizes needs them.
        """
        if isinstance(sizes, tuple):
            sizes = torch.tensor([[*sizes, 0, 0, *sizes]]).expand(len(text), -1)
        return self.family.conditions(self.unet, text, sizes)

    def encode_control(self, control: torch.Tensor, controlnet: Any) -> torch.Tensor:
        """Masks in their colors, [B,3,H,W] in [0,1], as a ControlNet takes them.

        That is as they are; of Stable Diffusion 3 through the autoencoder, as its pipeline in diffusers does.
        """
        if not self.family.encodes_control:
            return control
        foreign = getattr(controlnet, "module", controlnet).config.force_zeros_for_pooled_projection
        return encode_mean(self.vae, 2 * control - 1, shifted=not foreign).float()

    def residuals(
        self, controlnet: Any, latents: torch.Tensor, times: torch.Tensor, text: torch.Tensor,
        sizes: torch.Tensor | tuple[int, int] | None, control: torch.Tensor, weight: float = 1.0,
    ) -> Residuals:  # fmt: skip
        """What a ControlNet adds to the network: latents [B,C,h,w], times of `process`, control of `encode_control`."""
        given = self.conditions(text, sizes)
        return self.family.residuals(controlnet, latents, times, given, control, weight)

    def predict(
        self, latents: torch.Tensor, times: torch.Tensor, text: torch.Tensor,
        sizes: torch.Tensor | tuple[int, int] | None, residuals: Residuals | None = None, network: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """What the network predicts of noisy latents, [B,C,h,w]; network: its own as it is trained."""
        given = self.conditions(text, sizes)
        return self.family.predict(network or self.unet, latents, times, given, residuals or {})

    def one_text_encoder(self, flag: str) -> CLIPTextModel:
        """Its text encoder; UserError where it has several, which `flag` can't train."""
        assert self.text_encoder is not None
        if isinstance(self.text_encoder, TextEncoders):
            raise UserError(f"{flag}: expected a base with one text encoder, as in Stable Diffusion 1.x and 2.x, found"
                            f" {self.family.title} in {self.folder}; leave the flag out")  # fmt: skip
        return self.text_encoder


def load_base(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer_name: str | None = None,
    held: torch.dtype | None = None,
    lora: str | None = None,
    vae_folder: str | None = None,
    **hub: str | None,
) -> Base:
    """Load a base in Stable Diffusion's layout (1.x, 2.x, XL or 3), frozen; the safety checker is never loaded.

    held: in what the weights of its network are stored; none: `dtype`, as the rest. lora: a LoRA that is added to them.
    vae_folder: an autoencoder in place of its own. hub: revision and variant, of a base by name. UserError if a part of
    the layout is missing.
    """
    hub = {key: value for key, value in hub.items() if value is not None}
    unvaried = {key: value for key, value in hub.items() if key != "variant"}
    family = _check_layout(folder, **unvaried)
    own_tokenizer = {} if tokenizer_name else {"subfolder": "tokenizer"}
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    exact = torch.float32 if lora else dtype  # a LoRA's changes are small: they are added before weights are rounded
    unet = family.denoiser.from_pretrained(folder, subfolder=family.part, torch_dtype=exact, **hub)
    if lora:
        text_encoder = load_text_encoder(folder, family, dtype, exact, unet, **hub)
        encoders = text_encoder.of_clip if isinstance(text_encoder, TextEncoders) else [text_encoder]
        fuse_lora(lora, family, unet, *encoders)
        for network in (unet, *encoders):
            nn.Module.to(network, dtype)  # diffusers' own warns
    if held not in (None, dtype):
        hold(unet, held)
    # Copy the weights out of the memory-mapped file, which counts as ours while one is left there; before the other
    # parts are loaded, as this is where the most memory is taken.
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    vae = load_vae(folder, device, dtype, vae_folder, upcast=family.exact_vae, **hub)
    if not lora:
        text_encoder = load_text_encoder(folder, family, dtype, dtype, unet, **hub)
    for part in (text_encoder, unet):
        part.requires_grad_(False).eval().to(device)
    return Base(
        folder=str(folder),
        family=family,
        vae=vae,
        vae_config=dict(vae.config),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_name or folder, **own_tokenizer, **unvaried),
        unet=lay_out(unet, device),
        scheduler=family.process.kind.from_pretrained(folder, subfolder="scheduler", **unvaried),
        dtype=dtype,
        lora=lora,
        zeros_without_prompt=family.reads_sizes
        and index_of(folder, **unvaried).get("force_zeros_for_empty_prompt", True),
    )


def load_vae(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    other: str | None = None,
    upcast: bool = False,
    **hub: Any,
) -> AutoencoderKL:
    """The autoencoder of a base alone, frozen; other: the folder or name of one in place of it.

    upcast: it is in float32 where its config says so, as that of Stable Diffusion XL, whose images are black in fp16.
    OSError where there is none; UserError where `other` is none.
    """
    place: dict[str, Any] = {} if other else {"subfolder": "vae", **hub}
    try:
        config = AutoencoderKL.load_config(other or folder, **{k: v for k, v in place.items() if k != "variant"})
        dtype = torch.float32 if upcast and config.get("force_upcast", True) else dtype
        vae = AutoencoderKL.from_pretrained(other or folder, torch_dtype=dtype, **place)
    except OSError as error:
        if other is None:
            raise
        raise UserError(
            f"--pretrained_vae_model_name_or_path {other}: expected a folder with the config.json and weights of an"
            f" AutoencoderKL, or its name on the hub, found none ({str(error).splitlines()[0]})"
        ) from None
    return lay_out(vae.requires_grad_(False).eval().to(device), device)


def _check_layout(folder: str | Path, **hub: Any) -> Family:
    """The family of a base; a local folder must have every part, a name on the hub is left to diffusers."""
    place = Path(folder)
    looks_local = place.exists() or place.is_absolute() or str(folder).startswith(".")
    there = {part for part in PART_FOLDERS if (place / part).is_dir()}
    layout = parts_needed(there)
    missing = [part for part in layout if part not in there]
    if missing and looks_local:
        found = "no such folder" if not place.exists() else f"no {missing[0]}/ in it"
        raise UserError(
            f"{FLAG} {folder}: expected a Stable Diffusion folder with "
            f"{', '.join(part + '/' for part in layout)}, found {found}"
        )
    return family_of(folder, **hub)


def latent_factor(folder: str | Path) -> int:
    """The width of a latent cell in pixels, of a base whose weights need not be loaded for it."""
    _check_layout(folder)
    return _factor(AutoencoderKL.load_config(folder, subfolder="vae"))


def _factor(vae_config: dict[str, Any]) -> int:
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def base_fingerprint(folder: str | Path, lora: str | None = None) -> str:
    """16 hexadecimal digits that change with any config's text and any training of the weights, or a hub's name.

    lora: what is added to the weights.
    """
    digest = hashlib.sha256() if Path(folder).is_dir() else hashlib.sha256(str(folder).encode())
    for path in sorted(Path(folder).glob("*/*")):
        if path.parent.name in PART_FOLDERS and path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + _sampled(path))
    if lora:
        file = lora_file(lora)
        digest.update(_sampled(file) if file else lora.encode())
    return digest.hexdigest()[:16]


def folder_digest(folder: str | Path) -> str:
    """16 hexadecimal digits that change with any file in a model's folder, not those below it, or a hub's name."""
    files = sorted(path for path in Path(folder).glob("*") if path.is_file())
    digest = hashlib.sha256() if files else hashlib.sha256(str(folder).encode())
    for path in files:
        digest.update(path.name.encode() + _sampled(path))
    return digest.hexdigest()[:16]


def _sampled(path: Path) -> bytes:
    """A whole file or, over 4 MiB, its size and evenly spaced blocks of 64 KiB: enough to distinguish gigabytes."""
    size, blocks, block = path.stat().st_size, 64, 2**16
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
    return (mean + std * noise - _shift(vae_config)) * vae_config["scaling_factor"]


def unscale(vae_config: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents as the autoencoder's decoder takes them, both [B,C,h,w]."""
    return latents / vae_config["scaling_factor"] + _shift(vae_config)


def _shift(vae_config: Any) -> float:
    """What is subtracted from latents before they are scaled: of Stable Diffusion 3 their mean."""
    return vae_config.get("shift_factor") or 0.0


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents [B,C,h,w] -> image [B,3,H,W] in about [-1,1], with their gradient."""
    return vae.decode(unscale(vae.config, latents.to(vae.device, vae.dtype))).sample.float()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The same without gradient."""
    return decode_latents(vae, latents)


def encode_mean(vae: AutoencoderKL, image: torch.Tensor, shifted: bool = True) -> torch.Tensor:
    """image [B,3,H,W] in [-1,1] -> the posterior's mean as scaled latents [B,C,h,w]; shifted: as latents of images."""
    shift = _shift(vae.config) if shifted else 0.0
    return (encode_moments(vae, image).chunk(2, dim=1)[0] - shift) * vae.config.scaling_factor


def reconstruct(vae: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    """image [B,3,H,W] in [-1,1] through the autoencoder's posterior mean and back: the best any latent model can do."""
    return decode(vae, encode_mean(vae, image))


def encode_text(base: Base, captions: list[str], trained: nn.Module | None = None) -> torch.Tensor:
    """Captions -> embeddings [B,L,D], cut at the tokenizer's length; `Base.conditions` says how they are read.

    trained: the base's text encoder as it is trained, which then gets gradients.
    """
    encoder = base.text_encoder
    assert encoder is not None
    tokens = tokenize(base.tokenizer, captions).to(encoder.device)
    with torch.set_grad_enabled(trained is not None):
        if isinstance(encoder, TextEncoders):
            return encoder(tokens, *(others.to(encoder.device) for others in encoder.tokenize(captions)))
        return (trained or encoder)(tokens)[0]


def plain_pipeline(base: Base, scheduler: Any, controlnet: ModelMixin | None = None) -> Any:
    """diffusers' own pipeline around the loaded parts, without the safety checker, which blackens images."""
    family, encoder = base.family, base.text_encoder
    parts: dict[str, Any] = {family.part: base.unet, "vae": base.vae, "tokenizer": base.tokenizer}
    parts |= encoder.parts if isinstance(encoder, TextEncoders) else {"text_encoder": encoder}
    if family.reads_sizes:
        parts |= {"add_watermarker": False, "force_zeros_for_empty_prompt": base.zeros_without_prompt}
    if not isinstance(encoder, TextEncoders):
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts |= {"scheduler": scheduler} | ({} if controlnet is None else {"controlnet": controlnet})
    return getattr(diffusers, f"{family.name}{'' if controlnet is None else 'ControlNet'}Pipeline")(**parts)
