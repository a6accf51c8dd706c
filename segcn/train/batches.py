"""What a training step needs of each row (Examples), and which rows each step takes (Plan)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from segcn.data import sampler
from segcn.data.captions import cut_captions
from segcn.data.dataset import PairedDataset, to_control
from segcn.data.metadata import Split
from segcn.data.sampler import Groups, Stream, cell_weights, class_weights
from segcn.data.transforms import Draw, size_ids
from segcn.models.base import Base
from segcn.train import latent_cache
from segcn.train.config import TrainConfig, reward_timesteps
from segcn.train.latent_cache import LatentCache, cache_root
from segcn.train.loss import valid_cells
from segcn.utils import rng
from segcn.utils.errors import UserError

REWARDED = 0.5  # share of the rows of a batch
EXAMPLE_DEFAULTS = {
    "empty_prompts": 0.0,  # share of captions replaced by the empty one
    "class_dropout": 0.0,  # share of captions that leave out a class, half of them all classes
    "empty_controls": 0.0,  # share of controls replaced by black
    "draw": rng.integer,  # (number of timesteps, *key) -> a timestep
    "class_weights": None,  # float32 [K] by class id; None: no weights
    "reward": None,  # (low, high): half of the rows also get a timestep from low to high, for --reward_weight
    "captions": False,  # text as it is, not embedded: the text encoder is trained
    "images": False,  # the image and its valid pixels besides the moments: the decoder is trained
}


class BadSample(UserError):
    """A row that cannot be read, by the message of the process that read it, without the traceback of a worker."""

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


class Examples(Dataset):
    """What a training step needs of (visit, row): moments or image, control, valid cells, text, noise, timestep.

    The visits of a row are numbered from 0; without class balance its visit in each epoch is the epoch. `row` is the
    one that is shown: the next good one, of its shape, where the file of a row went bad before it was encoded. A key
    may have a share, too, the weight of the row's loss (see `Plan`).
    """

    def __init__(self, dataset: PairedDataset, cache: LatentCache | None, factor: int, latent_shape, settings: dict):
        self.dataset, self.cache = dataset, cache
        self.factor = factor  # pixels per side of a latent cell
        self.latent_shape = latent_shape  # (C,h,w); with buckets only C counts
        self.settings = EXAMPLE_DEFAULTS | settings  # and seed, timesteps (number of)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple) -> dict[str, torch.Tensor | str | int]:
        visit, row, *share = key
        seed, settings = self.settings["seed"], self.settings
        example, mask, valid = (self._read if self.cache is None else self._cached)(visit, row)
        example["cells"] = valid_cells(valid[None], self.factor)[0]
        if rng.uniform("control drop", seed, visit, row) < settings["empty_controls"]:
            example["control"] = torch.zeros_like(example["control"])
        if settings["class_weights"] is not None:
            example["weights"] = cell_weights(mask, settings["class_weights"], self.factor)
        if settings["reward"] is not None:
            low, high = settings["reward"]
            chosen = rng.uniform("reward", seed, visit, row) < REWARDED
            timestep = low + rng.integer(high - low, "reward timestep", seed, visit, row)
            example |= {"mask": mask, "reward_timestep": timestep if chosen else -1}
        if share:
            example["share"] = torch.tensor(share[0])
        latent_shape = (self.latent_shape[0], *example["cells"].shape)
        return example | {
            "posterior": rng.normal(latent_shape, "posterior", seed, visit, row),
            "noise": rng.normal(latent_shape, "noise", seed, visit, row),
            "timestep": settings["draw"](settings["timesteps"], "timestep", seed, visit, row),
        }

    def _dropped(self, caption: str, visit: int, row: int) -> str:
        """The caption, the empty one, or one that names no class or all but one."""
        seed, settings = self.settings["seed"], self.settings
        if rng.uniform("caption drop", seed, visit, row) < settings["empty_prompts"]:
            return ""
        if rng.uniform("class drop", seed, visit, row) < settings["class_dropout"]:
            which = max(0, rng.integer(4, "cut", seed, visit, row) - 1)  # half of them name no class
            return cut_captions(caption, self.dataset.split.palette)[which]
        return caption

    def _read(self, visit: int, row: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Image, control and caption, class ids uint8 [R,R], valid pixels bool [R,R]."""
        try:
            sample = self.dataset.sample(row, visit)
        except UserError as error:
            raise BadSample(f"{error}\nThe file was good when it was checked. Fix it, then rerun to resume.") from None
        caption = self._dropped(sample.caption, visit, row)
        example = {"image": sample.image, "control": sample.control, "caption": caption, "row": row}
        example["sizes"] = self._sizes(sample.draw, sample.original.shape[1:])
        example |= {"valid": sample.valid} if self.settings["images"] else {}
        return example, sample.mask, sample.valid

    def _cached(self, visit: int, row: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """The same, with moments in place of the image and the text's embedding in place of the caption."""
        cache = self.cache
        assert cache is not None
        draw, used = visit % cache.draws, cache.good(row, self.dataset.shapes)
        entry, (height, width) = cache.entry(draw, used), self.dataset.shapes[used].tolist()
        pixels, cells = (height, width), (len(entry["moments"]), height // self.factor, width // self.factor)
        mask = torch.from_numpy(np.array(entry["mask"].reshape(-1)[: height * width].reshape(pixels)))
        valid = torch.from_numpy(np.unpackbits(entry["frame"], count=height * width)).bool().view(pixels)
        moments = entry["moments"].reshape(-1)[: math.prod(cells)].reshape(cells)
        drawn = self.dataset.draw(used, draw)
        caption = self._dropped(self.dataset.caption(used, visit, drawn.flip), visit, row)
        example = {
            "moments": torch.from_numpy(moments.astype(np.float32)),
            "control": to_control(mask, self.dataset.split.palette) * valid,
            "text": torch.from_numpy(cache.text_of(caption).astype(np.float32)),
            "row": used,
        }
        if cache.layout.sized:
            example["sizes"] = self._sizes(drawn, entry["size"].tolist())
        if self.settings["captions"]:
            example["caption"] = caption
            del example["text"]
        if self.settings["images"]:
            example |= {"image": self.dataset.sample(used, draw).image, "valid": valid}
        return example, mask, valid

    def _sizes(self, drawn: Draw, size: Sequence[int]) -> torch.Tensor:
        """float32 [6], of a row whose original has that size: height, width."""
        return torch.tensor(size_ids(drawn, size, self.dataset.resolution))


class Plan:
    """Batches of (visit, row) keys for one process from an optimizer step on: a batch sampler.

    Micro-batch a of step t on process r takes positions ((t A + a) W + r) B to + B of the stream of rows. With shapes
    (int [N, 2], of --buckets) it takes part a W + r of A W of the t-th of `Groups` of A W B rows; each key then has a
    share, too, so that in the mean of the losses of all parts a row weighs 1 / (A W B), also in a group that is
    smaller. Where it has fewer rows than parts, some parts are a row of it whose share is 0.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        start: int,
        stop: int,
        accumulate: int,
        batch: int,
        rank=0,
        world=1,
        repeats=None,
        shapes: np.ndarray | None = None,
    ):
        if rows < 1:
            raise UserError("the data set has no rows")
        self.stream, self.micro = Stream(rows, seed, repeats), range(start * accumulate, stop * accumulate)
        self.batch, self.rank, self.world, self.accumulate = batch, rank, world, accumulate
        self.groups = None if shapes is None else Groups(self.stream, shapes, accumulate * world * batch)

    def __len__(self) -> int:
        return len(self.micro)

    def __iter__(self):
        for micro in self.micro:
            if self.groups is not None:
                yield self._part(*divmod(micro, self.accumulate))
                continue
            first = (micro * self.world + self.rank) * self.batch
            yield [self.stream[first + i] for i in range(self.batch)]

    def _part(self, step: int, place: int) -> list[tuple[int, int, float]]:
        """This process's keys of a micro-batch, with their shares."""
        assert self.groups is not None
        group, parts, part = self.groups[step], self.accumulate * self.world, place * self.world + self.rank
        own = group[len(group) * part // parts : len(group) * (part + 1) // parts]
        return [(*key, len(own) / self.batch) for key in own] or [(*group[0], 0.0)]


def rows_of_epochs(config: TrainConfig, dataset: PairedDataset, repeats: np.ndarray | None, processes: int) -> int:
    """The rows shown in --num_train_epochs; with --buckets a group of rows that is smaller counts as a full one."""
    stream = Stream(len(dataset), config.seed, repeats)
    if not config.buckets:
        return stream.start(config.num_train_epochs)
    size = config.train_batch_size * config.gradient_accumulation_steps * processes
    return Groups(stream, dataset.shapes, size).start(config.num_train_epochs) * size


def make_examples(config: TrainConfig, dataset: PairedDataset, base: Base, accelerator, log) -> Examples:
    """The source of training examples; with the cache, both encoders leave memory, unless validation uses them."""
    cache = None
    if config.cache == "latents":
        folder, limit = latent_cache.cache_folder(config, dataset, base), latent_cache.parse_limit(config.on_bad_sample)
        assert config.cache_draws is not None
        cuts = config.caption_class_dropout > 0
        cache = latent_cache.build(folder, dataset, base, config.cache_draws, accelerator, log.say, limit, cuts)
        for row in cache.bad:
            cache.good(row, dataset.shapes)  # an error before the first step, where none of its shape is left
        if not (config.validation_image or config.validation_prompt or config.faithfulness_rows):
            base.text_encoder = base.text_encoder if "text_encoder" in config.trains else None
            needed = config.reward_segmenter or "vae_decoder" in config.trains or base.family.encodes_control
            base.vae = base.vae if needed else None
    settings = {
        "seed": config.seed,
        "captions": "text_encoder" in config.trains,
        "images": "vae_decoder" in config.trains,
        "empty_prompts": config.proportion_empty_prompts,
        "class_dropout": config.caption_class_dropout,
        "empty_controls": config.proportion_empty_controls,
        "timesteps": base.scheduler.config.num_train_timesteps,
        "draw": base.process.draw,
        "class_weights": make_class_weights(config, dataset.split, accelerator),
        "reward": reward_timesteps(config) if config.reward_weight else None,
    }
    side = config.resolution // base.latent_factor
    return Examples(dataset, cache, base.latent_factor, (base.latent_channels, side, side), settings)


def make_class_weights(config: TrainConfig, split: Split, accelerator) -> torch.Tensor | None:
    """The weight of each class in the loss, for --class_weighting."""
    if not config.class_weighting:
        return None
    return class_weights(sampler.read_class_pixels(split, cache_root(config), accelerator), config.class_weighting)
