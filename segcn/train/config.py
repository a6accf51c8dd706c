"""Settings of `segcn train`: the flags of diffusers' train_controlnet.py under their names, and our own."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from segcn.data.config import BUCKET, BUCKETS, FITS
from segcn.utils.args import PRECISIONS, flag
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE, OUTPUTS

OBSOLETE = (
    "enable_xformers_memory_efficient_attention", "set_grads_to_none", "dataset_config_name", "image_column",
    "conditioning_image_column", "caption_column", "image_interpolation_mode",
)  # fmt: skip
CONTROLNETS = ("full", "lora")
UNET_PARTS = ("lora", "decoder", "all")  # what can be trained of a U-Net
LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
]  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Train a ControlNet on a frozen Stable Diffusion."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {  # what a preset changes; sd15 keeps diffusers' defaults
        "sd15": {},
        "tiny": {
            "resolution": 128,
            "train_batch_size": 8,
            "max_train_steps": 800,
            "learning_rate": 1.5e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 40,
            "proportion_empty_prompts": 0.1,
            "caption_class_dropout": 0.5,
            "reward_weight": 1.0,
            "cache_draws": 2,
            "checkpointing_steps": 400,
            "checkpoints_total_limit": 2,
            "validation_steps": 200,
            "num_validation_images": 1,
            "report_to": "none",
        },
    }
    SECTIONS: ClassVar[dict[str, str]] = {  # the titles of --help, by their first flag
        "preset": "data and models",
        "resolution": "the image and its augmentation",
        "prediction_type": "the loss",
        "controlnet": "what is trained",
        "max_train_steps": "optimization",
        "checkpointing_steps": "checkpoints",
        "logging_steps": "validation and logging",
        "mixed_precision": "the machine",
        "enable_xformers_memory_efficient_attention": "accepted for old command lines",
    }
    EPILOG: ClassVar[str] = f"""
fields of --augment, such as --augment affine,degrees=20,fill=cover:
  degrees=10 translate=0.1 scale_min=0.9 scale_max=1.2 shear=5 hflip=0.5 crop_min=1 crop_shift=1
  brightness=0.1 contrast=0.1 saturation=0.1 hue=0 fill=ignore|cover sided_captions=skip|rewrite

Rerun the same command to resume. accelerate configurations for one GPU, one node and two nodes, and
a Slurm script that requeues itself, are in
  {Path(__file__).parent / "cluster"}
"""

    preset: str = flag(
        "sd15", "defaults: sd15 (diffusers' own) or tiny (embedded base); none: what fits the base", ("sd15", "tiny")
    )
    # data and models
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion's layout (1.x, 2.x, XL or 3), or its name on the hub"
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "autoencoder in place of the base's: a folder, or a name"
    )
    controlnet_model_name_or_path: str | None = flag(None, "ControlNet to start from; none: a copy of the base")
    tokenizer_name: str | None = flag(None, "tokenizer folder, if it is not the base's")
    lora: str | None = flag(None, "LoRA of the base, a folder that segcn adapt or diffusers wrote; frozen, too")
    revision: str | None = flag(None, "revision of the base on the hub")
    variant: str | None = flag(None, "variant of the base's weight files, such as fp16")
    dataset_name: str | None = flag(None, "data set folder, or its metadata.csv")
    train_data_dir: str | None = flag(None, "the same as --dataset_name")
    max_train_samples: int | None = flag(None, "use only the first rows", low=1)
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    output_dir: str = flag(str(OUTPUTS / "controlnet"), "run folder: checkpoints, log and the finished ControlNet")
    cache_dir: str | None = flag(None, "latent caches, not downloads as in diffusers' script; none: outputs/cache")
    cache: str = flag("latents", "latents: encode before step 0; none: encode in every step", ("latents", "none"))
    cache_draws: int | None = flag(None, "augmented draws of each row; none: as many as fit --cache_budget_gb", low=1)
    cache_budget_gb: float = flag(20.0, "disk space for the draws of the cache, in GB (10^9 bytes)", low=0)
    on_bad_sample: str = flag("fail", "an unreadable file: fail, or skip:N for the next row, N times at most")
    # the image and its augmentation
    resolution: int = flag(512, "image size in pixels", low=1)
    fit: str = flag("crop", "how images become square: crop the middle, pad with a border, or stretch", FITS)
    buckets: bool = flag(False, BUCKETS)
    augment: str = flag("affine", "affine or none, and changes to its fields (below), such as affine,degrees=20")
    class_balance: float = flag(0.0, "repeat rows with classes rarer than this share; 0: off", low=0, high=1)
    proportion_empty_prompts: float = flag(0.0, "share of captions replaced by the empty one", low=0, high=1)
    caption_class_dropout: float = flag(
        0.0, "share of captions that leave out classes, half of them all: the mask says what is where", low=0, high=1
    )
    proportion_empty_controls: float = flag(0.0, "share of masks replaced by an empty control", low=0, high=1)
    # the loss
    prediction_type: str | None = flag(
        None,
        "what the base predicts: epsilon or v_prediction; none: as its scheduler says",
        ("epsilon", "v_prediction"),
    )
    rescale_betas_zero_snr: bool = flag(False, "zero terminal SNR (arXiv:2305.08891); for bases that predict v")
    snr_gamma: float | None = flag(None, "Min-SNR weights of the loss (arXiv:2303.09556); 5 is usual; none: off")
    class_weighting: float = flag(0.0, "weight the loss by class, 1 / (share of pixels)^this, such as 0.5; 0: off")
    reward_weight: float = flag(0.0, "weight of the consistency reward (arXiv:2404.07987); 1 is usual; 0: off", low=0)
    reward_start: float = flag(0.5, "share of the training after which it rewards", low=0, high=1)
    reward_timesteps: str = flag("200,700", "LOW,HIGH: the timesteps of the rewarded half of each batch")
    reward_segmenter: str | None = flag(
        None, "trained segmenter folder that rewards, and never scores; none: a fast one of latents is trained"
    )
    # what is trained
    controlnet: str = flag(
        "full", "full; or lora: the base's encoder with a LoRA, small to train and keep", CONTROLNETS
    )
    train_unet: str | None = flag(
        None, "of the base, too: a lora, or its decoder in full; none: frozen", UNET_PARTS[:2]
    )
    lora_rank: int = flag(16, "rank of a LoRA that is trained", low=1)
    lora_alpha: int | None = flag(None, "its weight is this / rank; none: the rank, so 1", low=1)
    lora_targets: list[str] = flag(
        LORA_TARGETS, "ends of the names of the layers that get one; a transformer has others"
    )
    merge: bool = flag(False, "with --controlnet lora: write a full ControlNet with the LoRA in its weights")
    # optimization
    max_train_steps: int | None = flag(None, "optimizer steps; none: --num_train_epochs", low=1)
    num_train_epochs: int = flag(1, "epochs, if --max_train_steps is not given", low=1)
    train_batch_size: int = flag(4, "rows in a micro-batch of each process", low=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches in an optimizer step", low=1)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    learning_rate: float = flag(5e-6, "peak learning rate; with --controlnet lora: 1e-4, tiny 3e-3", low=0)
    scale_lr: bool = flag(False, "multiply the learning rate by processes, accumulation and batch size")
    lr_scheduler: str = flag(
        "constant",
        "linear, polynomial, cosine, cosine_with_restarts, constant, constant_with_warmup, piecewise_constant:1:99,0.1",
    )
    lr_warmup_steps: int = flag(500, "optimizer steps of warm-up, for schedules that have one", low=0)
    lr_num_cycles: int = flag(1, "hard resets of cosine_with_restarts", low=1)
    lr_power: float = flag(1.0, "power of the polynomial schedule")
    use_8bit_adam: bool = flag(False, "bitsandbytes' 8-bit AdamW")
    fused_adam: bool = flag(True, "fused AdamW kernel: same result, faster; --no_fused_adam: PyTorch's default")
    use_ema: bool = flag(False, "keep an exponential moving average of the weights; it is sampled from and saved")
    ema_decay: float = flag(0.9999, "decay of the average; step t uses at most (1 + t) / (10 + t)", low=0, high=1)
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment")
    adam_weight_decay: float = flag(1e-2, "weight decay of AdamW")
    adam_epsilon: float = flag(1e-8, "epsilon of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    seed: int = flag(0, "seed of row order, noise, timesteps, captions and augmentation; diffusers' script: none")
    # checkpoints
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints", low=1)
    checkpoints_total_limit: int | None = flag(None, "newest checkpoints to keep; none: all", low=1)
    resume_from_checkpoint: str = flag(
        "latest", "latest: resume if there is one, unlike in diffusers' script; or a checkpoint-N folder of this run"
    )
    allow_changes: bool = flag(False, "resume although settings or data differ from those of the run")
    # validation and logging
    logging_steps: int = flag(10, "optimizer steps between lines of log.jsonl", low=1)
    validation_image: list[str] | None = flag(None, "masks to generate images from while training")
    validation_prompt: list[str] | None = flag(None, "a prompt for each mask, or one for all")
    validation_steps: int = flag(100, "optimizer steps between validation images", low=1)
    num_validation_images: int = flag(4, "images for each mask and prompt", low=1)
    faithfulness_rows: int = flag(
        0, "held-out rows to generate from and score while training; the best step is kept; 0: none", low=0
    )
    segmenter: str | None = flag(None, "trained segmenter folder that scores them; none: trained on the training rows")
    report_to: str = flag(
        "tensorboard",
        "trackers beside log.jsonl, which is always written",
        ("none", "tensorboard", "wandb", "comet_ml", "all"),
    )
    tracker_project_name: str = flag("train_controlnet", "name of the run in the trackers")
    logging_dir: str = flag("logs", "tracker files, below the run folder")
    # the machine
    mixed_precision: str | None = flag(None, "no, fp16 (V100) or bf16; none: as accelerate is configured", PRECISIONS)
    frozen_precision: str | None = flag(None, "of the frozen U-Net; none: as --mixed_precision", PRECISIONS)
    memory_preset: int | None = flag(
        None, "fit into a GPU of so many GB: precision, Adam, recomputing", (8, 12, 16, 24)
    )
    preflight: bool = flag(False, "run two steps, print memory and speed, propose batch size and accumulation; no run")
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere and newer")
    dataloader_num_workers: int = flag(0, "subprocesses that read data, for each training process; 0: none", low=0)
    push_to_hub: bool = flag(False, "upload the finished ControlNet, its palette and its model card to the hub")
    hub_token: str | None = flag(None, "token of the hub, never saved; none: the one of hf auth login, or HF_TOKEN")
    hub_model_id: str | None = flag(None, "repository to upload to: name/repository; none: the run folder's name")
    # accepted for old command lines
    enable_xformers_memory_efficient_attention: bool = flag(False, "PyTorch's own attention is used")
    set_grads_to_none: bool = flag(False, "always so in PyTorch 2")
    dataset_config_name: str | None = flag(None, "data sets are folders")
    image_column: str = flag("image", "metadata.csv names it file_name")
    conditioning_image_column: str = flag("conditioning_image", "metadata.csv names it conditioning_image_file_name")
    caption_column: str = flag("text", "metadata.csv names it text")
    image_interpolation_mode: str = flag("bilinear", "images are resized bilinear with antialias, masks NEAREST")

    @property
    def dataset(self) -> str:
        """The data set by either of its flags; UserError without."""
        found = self.dataset_name or self.train_data_dir
        if found is None:
            raise UserError("--dataset_name: expected a data set folder or its metadata.csv, found nothing")
        return found

    @property
    def framing(self) -> str:
        """How an image gets its shape: as --fit says, or by --buckets."""
        return BUCKET if self.buckets else self.fit

    @property
    def trains(self) -> tuple[str, ...]:
        """What is trained: controlnet, and of the base one of lora, decoder and all, or vae_decoder."""
        return ("controlnet", *([self.train_unet] if self.train_unet else []))


@dataclass(frozen=True)
class AdaptConfig(TrainConfig):
    """Teach the base a domain, from images alone: a LoRA of its U-Net, or its own weights."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {},
        "tiny": TrainConfig.PRESETS["tiny"] | {
            "train_batch_size": 16, "max_train_steps": 1000, "learning_rate": 1e-3, "lr_warmup_steps": 20,
            "checkpointing_steps": 250, "validation_steps": 250, "caption_class_dropout": 0.0, "reward_weight": 0.0,
        },
    }  # fmt: skip
    SECTIONS: ClassVar[dict[str, str]] = TrainConfig.SECTIONS | {
        "snr_gamma": "the loss", "lora_rank": "what is trained of the base", "unlock": "what else is trained",
    }  # fmt: skip
    HIDDEN: ClassVar[tuple[str, ...]] = (  # flags of segcn train that need masks or a ControlNet
        "controlnet_model_name_or_path", "lora", "class_balance", "proportion_empty_controls", "class_weighting",
        "controlnet", "train_unet", "faithfulness_rows", "segmenter", "validation_image", "caption_class_dropout",
        "reward_weight", "reward_start", "reward_timesteps", "reward_segmenter", "prediction_type",
        "rescale_betas_zero_snr", *OBSOLETE,
    )  # fmt: skip

    dataset_name: str | None = flag(None, "folder of images, or a data set, whose masks are not used")
    output_dir: str = flag(str(OUTPUTS / "adapted"), "run folder: checkpoints, log, and the LoRA or the new base")
    learning_rate: float = flag(1e-4, "peak learning rate", low=0)
    proportion_empty_prompts: float = flag(0.1, "share of captions replaced by the empty one", low=0, high=1)
    validation_prompt: list[str] | None = flag(None, "prompts to generate images from while training")
    validation_steps: int = flag(500, "optimizer steps between validation images", low=1)
    tracker_project_name: str = flag("adapt_base", "name of the run in the trackers")
    unlock: str | None = flag(
        None, "train weights of the U-Net in full, its decoder or all of it; none: a LoRA", UNET_PARTS[1:]
    )
    lora_text_encoder: bool = flag(False, "a LoRA of the text encoder, too; texts are then encoded in every step")
    merge: bool = flag(False, "write a base with the LoRA in its weights, in place of the LoRA")
    vae_decoder: bool = flag(
        False,
        "train the autoencoder's decoder instead, in small batches (4); its encoder, so all latents, stay as they are",
    )

    @property
    def trains(self) -> tuple[str, ...]:
        if self.vae_decoder:
            return ("vae_decoder",)
        return (self.unlock or "lora", *(["text_encoder"] if self.lora_text_encoder else []))


LIGHT_RATES = {"sd15": 1e-4, "tiny": 3e-3}  # the default of --learning_rate with --controlnet lora, by preset
MEMORY_PRESETS = {  # GB: images of 512 px in a micro-batch, and what is switched on besides half precision
    8: (1, {"use_8bit_adam": True, "gradient_checkpointing": True}),
    12: (1, {"gradient_checkpointing": True}),
    16: (2, {}),
    24: (4, {}),
}
# Settings that may differ when a run is resumed: neither data nor loss change (only the end of a schedule moves).
MODELS_BY_CONTENT = (
    "controlnet_model_name_or_path", "pretrained_vae_model_name_or_path", "reward_segmenter", "segmenter",
    "tokenizer_name",
)  # fmt: skip
FREE_TO_CHANGE = {  # the data set and the base are compared by their content, too
    *MODELS_BY_CONTENT, "dataset_name", "pretrained_model_name_or_path",
    "allow_changes", "allow_symlinks", "cache_budget_gb", "cache_dir", "checkpointing_steps", "lora", "merge",
    "checkpoints_total_limit", "dataloader_num_workers", "hub_model_id", "hub_token", "logging_dir", "logging_steps",
    "max_train_steps", "num_train_epochs", "num_validation_images", "on_bad_sample", "output_dir", "preflight",
    "push_to_hub", "report_to", "resume_from_checkpoint", "tracker_project_name", "validation_image",
    "validation_prompt", "validation_steps",
    *OBSOLETE,
}  # fmt: skip


def reward_timesteps(config: TrainConfig) -> tuple[int, int]:
    """Lowest and highest of --reward_timesteps; UserError unless they are two numbers in rising order."""
    found = re.fullmatch(r"(\d+),(\d+)", config.reward_timesteps.replace(" ", ""))
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--reward_timesteps: expected LOW,HIGH such as 200,700, found {config.reward_timesteps!r}")
    return int(found[1]), int(found[2])


def total_steps(config: TrainConfig, shown: int, num_processes: int = 1) -> int:
    """Optimizer steps of a whole training; `shown`: rows in all its epochs, repeated ones counted each time."""
    per_step = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    return config.max_train_steps or math.ceil(shown / per_step)
