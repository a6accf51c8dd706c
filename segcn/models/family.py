"""What distinguishes the families of base models: their parts, what their networks take, and what a ControlNet copies.

Stable Diffusion 1.x and 2.x; XL (Podell et al. 2023, arXiv:2307.01952), which has two text encoders and reads the sizes
of images; 3 and 3.5 medium (Esser et al. 2024, arXiv:2403.03206), a transformer in place of the U-Net."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import ControlNetModel, SD3ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from segcn.models.noise import Diffusion, Flow
from segcn.utils.errors import UserError

FLAG = "--pretrained_model_name_or_path"
Residuals = dict[str, Any]  # what a ControlNet adds, by the names of what the denoising network takes


class Family:
    """Stable Diffusion 1.x and 2.x; the other families say where they differ."""

    title: ClassVar[str] = "Stable Diffusion 1.x or 2.x"
    name: ClassVar[str] = "StableDiffusion"  # how the names of diffusers' pipelines for it begin
    part: ClassVar[str] = "unet"  # the folder of the network that denoises
    layout: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # of a base
    optional: ClassVar[tuple[str, ...]] = ()
    denoiser: ClassVar[Any] = UNet2DConditionModel
    controlnet: ClassVar[Any] = ControlNetModel
    control_argument: ClassVar[str] = "image"  # of its pipeline: the mask
    process: ClassVar[type[Diffusion]] = Diffusion
    reads_sizes: ClassVar[bool] = False
    encodes_control: ClassVar[bool] = False  # whether the ControlNet sees the mask through the autoencoder
    exact_vae: ClassVar[bool] = False  # whether the autoencoder stays in float32 where its config says so
    shared_sizes: ClassVar[tuple[str, ...]] = (  # of the network and its ControlNet
        "in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type",
    )  # fmt: skip
    lora_targets: ClassVar[tuple[str, ...]] = ()  # in place of the default of --lora_targets, which is a U-Net's

    def cell(self, network: Any) -> int:
        """Latent cells along one side of what the network sees as one: images must have whole ones."""
        return 1

    def text_shape(self, network: Any, length: int) -> tuple[int, int]:
        """(L,D) of the embedding of a caption; length: tokens of the first text encoder."""
        return length, network.config.cross_attention_dim

    def conditions(self, network: Any, text: torch.Tensor, sizes: torch.Tensor | None) -> dict[str, Any]:
        """What network and ControlNet take besides latents and time, by diffusers' names; text [B,L,D], sizes [B,6]."""
        return {"encoder_hidden_states": text}

    def residuals(
        self, controlnet: Any, latents: torch.Tensor, times: torch.Tensor, given: dict[str, Any],
        control: torch.Tensor, weight: float,
    ) -> Residuals:  # fmt: skip
        """What a ControlNet adds to the network that denoises; given: of `conditions`."""
        down, middle = controlnet(
            latents, times, **given, controlnet_cond=control, conditioning_scale=weight, return_dict=False
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def predict(
        self, network: Any, latents: torch.Tensor, times: torch.Tensor, given: dict[str, Any], residuals: Residuals
    ) -> torch.Tensor:
        """What the network predicts, [B,C,h,w]; times: [B], or one for all."""
        return network(latents, times, **given, **residuals).sample

    def decoder(self, network: Any) -> list[nn.Module]:
        """The part of the network that a ControlNet does not copy."""
        return [network.up_blocks]


class XL(Family):
    """Stable Diffusion XL."""

    title = "Stable Diffusion XL"
    name = "StableDiffusionXL"
    layout = (*Family.layout, "text_encoder_2", "tokenizer_2")
    reads_sizes = True
    exact_vae = True

    def text_shape(self, network: Any, length: int) -> tuple[int, int]:
        return length + 1, network.config.cross_attention_dim

    def conditions(self, network: Any, text: torch.Tensor, sizes: torch.Tensor | None) -> dict[str, Any]:
        """The last line of text is the pooled embedding."""
        assert sizes is not None
        config = network.config
        width = config.projection_class_embeddings_input_dim - sizes.shape[1] * config.addition_time_embed_dim
        added = {"text_embeds": text[:, -1, :width], "time_ids": sizes.to(text.device, torch.float32)}
        return {"encoder_hidden_states": text[:, :-1], "added_cond_kwargs": added}


class SD3(Family):
    """Stable Diffusion 3 and 3.5 medium."""

    title = "Stable Diffusion 3"
    name = "StableDiffusion3"
    part = "transformer"
    layout = ("transformer", *XL.layout[1:])
    optional = ("text_encoder_3", "tokenizer_3")  # T5
    denoiser = SD3Transformer2DModel
    controlnet = SD3ControlNetModel
    control_argument = "control_image"
    process = Flow
    encodes_control = True
    shared_sizes = (
        "in_channels", "patch_size", "num_attention_heads", "attention_head_dim", "joint_attention_dim",
        "caption_projection_dim", "pooled_projection_dim",
    )  # fmt: skip
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
        "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    T5_LENGTH: ClassVar[int] = 256  # tokens that T5 reads, as in diffusers' pipeline

    def cell(self, network: Any) -> int:
        return network.config.patch_size

    def text_shape(self, network: Any, length: int) -> tuple[int, int]:
        return length + self.T5_LENGTH + 1, network.config.joint_attention_dim

    def conditions(self, network: Any, text: torch.Tensor, sizes: torch.Tensor | None) -> dict[str, Any]:
        """The last line of text is the pooled embedding."""
        pooled = text[:, -1, : network.config.pooled_projection_dim]
        return {"encoder_hidden_states": text[:, :-1], "pooled_projections": pooled}

    def residuals(
        self, controlnet: Any, latents: torch.Tensor, times: torch.Tensor, given: dict[str, Any],
        control: torch.Tensor, weight: float,
    ) -> Residuals:  # fmt: skip
        if getattr(controlnet, "module", controlnet).config.force_zeros_for_pooled_projection:
            given = given | {"pooled_projections": torch.zeros_like(given["pooled_projections"])}
        found = controlnet(
            latents, timestep=times.expand(len(latents)), **given, controlnet_cond=control, conditioning_scale=weight,
            return_dict=False,
        )  # fmt: skip
        return {"block_controlnet_hidden_states": found[0]}

    def predict(
        self, network: Any, latents: torch.Tensor, times: torch.Tensor, given: dict[str, Any], residuals: Residuals
    ) -> torch.Tensor:
        return network(latents, timestep=times.expand(len(latents)), **given, **residuals).sample

    def decoder(self, network: Any) -> list[nn.Module]:
        return [network.transformer_blocks[copied_blocks(network) :], network.norm_out, network.proj_out]


FAMILIES: tuple[Family, ...] = (Family(), XL(), SD3())
PART_FOLDERS = {part for family in FAMILIES for part in (*family.layout, *family.optional)}


def parts_needed(parts: set[str]) -> tuple[str, ...]:
    """The parts that a base needs, by those that its folder has."""
    known, xl, sd3 = FAMILIES
    if sd3.part in parts:
        return (*sd3.layout, *(sd3.optional if parts & set(sd3.optional) else ()))
    return xl.layout if parts & (set(xl.layout) - set(known.layout)) else known.layout


def copied_blocks(transformer: Any) -> int:
    """How many of a transformer's first blocks its ControlNet copies: half of them, 12 of SD3.5 medium's 24."""
    return max(1, len(transformer.transformer_blocks) // 2)


def family_of(folder: str | Path, **hub: Any) -> Family:
    """The family of a base, by the configs of a folder or a name on the hub; UserError where it is another one."""
    folder = Path(folder) if Path(folder).is_dir() else folder
    known, xl, sd3 = FAMILIES
    if isinstance(folder, Path):
        transformer = (folder / "transformer").is_dir()
    else:
        transformer = "transformer" in index_of(folder, **hub)
    kind = sd3 if transformer else known
    found = kind.denoiser.load_config(folder, subfolder=kind.part, **hub)
    if found.get("_class_name", kind.denoiser.__name__) != kind.denoiser.__name__:
        raise UserError(f"{FLAG} {folder}: expected Stable Diffusion 1.x, 2.x, XL or 3, found {found['_class_name']}")
    return xl if found.get("addition_embed_type") == "text_time" else kind


def index_of(folder: str | Path, **hub: Any) -> dict[str, Any]:
    """The model_index.json of a base, empty where a folder has none."""
    if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
        return {}
    return diffusers.DiffusionPipeline.load_config(folder, **hub)


def each_residual(residuals: Residuals, change: Callable[[torch.Tensor], torch.Tensor]) -> Residuals:
    """Residuals of which each tensor is changed."""
    return {
        name: change(found) if isinstance(found, torch.Tensor) else [change(one) for one in found]
        for name, found in residuals.items()
    }
