"""What a study of usefulness consists of: the rows of each case, its arms, the stages with their settings."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from segcn.data.metadata import Split, find_splits, read_split, write_metadata
from segcn.data.transforms import AugmentConfig
from segcn.generate.config import GenerateConfig, LayoutsConfig
from segcn.models.base import base_fingerprint
from segcn.models.segmenter import SegmenterConfig
from segcn.study.config import StudyConfig
from segcn.study.training import BETTER, COOLED, KEPT_DRAWS, WARM, Rule
from segcn.train.config import TrainConfig
from segcn.utils import rng
from segcn.utils.args import check_values, make
from segcn.utils.errors import UserError
from segcn.utils.io import write_whole

TRAINING_STEP = 0.27  # seconds of a ControlNet's step at batch 8, 128 pixels, on two slow cores
DENOISING_STEP = 0.02  # of one image there
FITTING_SAMPLE = 0.0017  # of one image of 64 pixels through a small segmenter and back there
USUAL_STEPS = 2000  # about where a training ends whose length its plateau sets
VALIDATED, MOST_VALIDATED = 5, 256  # every fifth row drawn validates, at most so many
GENERATED = ("num_inference_steps", "controlnet_conditioning_scale", "prompt", "vary", "from_images",
             "inpaint", "augment_masks", "min_miou", "max_attempts", "hard_first", "batch_size")  # fmt: skip
NEW_TEXT = "{caption} with {classes}"  # of a new mask, whose caption names no class
PLACES = {"dataset_name", "controls", "output_dir", "cache_dir", "pretrained_model_name_or_path", "segmenter",
          "controlnet_model_name_or_path", "architecture"}  # fmt: skip


class Portion(NamedTuple):
    """Some of the real rows, with a ControlNet and synthetic images of their own."""

    draw: int
    fraction: float

    @property
    def name(self) -> str:
        return f"{self.fraction:g}-{self.draw}"


class Rows(NamedTuple):
    """The rows of a case: learned from, validated on, and others of the data set that it leaves; None: there are none.

    ControlNet, masks, captions and filter of the synthetic images come from those learned from, too.
    """

    learned: Split
    validation: Split
    other: Split | None


class Arm(NamedTuple):
    """What a segmenter learns from, and for how long.

    learns: real, synthetic, mixed (both) or bound (real with other real rows in place of the synthetic ones). images:
    how many synthetic ones. after: what the network has learned before. like: its whole training is as long as that of
    this arm.
    """

    learns: str
    images: int = 0
    after: "Arm | None" = None
    like: "Arm | None" = None

    @property
    def name(self) -> str:
        if self.like:
            return f"real, as long as {self.like.name}"
        if self.after:
            return f"{self.after.name}, then real"
        names = {"synthetic": f"{self.images} synthetic", "mixed": f"real with {self.images} synthetic mixed in",
                 "bound": "real with other real rows mixed in"}  # fmt: skip
        return names.get(self.learns, self.learns)

    @property
    def to_plateau(self) -> bool:
        """Whether it is trained until its plateau, and not for as long as others were."""
        return not (self.after or self.like or self.learns in MIXED)


MIXED = ("mixed", "bound")
REAL, BOUND = Arm("real"), Arm("bound")


class Choice(NamedTuple):
    """What is chosen for real alone, on its validation rows, and taken for all arms."""

    learning_rate: float
    augment: str


def check_study(config: StudyConfig) -> None:
    """UserError for settings that would fail only after a while, or mean nothing."""
    check_values(config)
    for text in (config.augment, *config.segmenter_augments):
        AugmentConfig.parse(text)
    SegmenterConfig(architecture=config.segmenter_architecture).content  # noqa: B018
    if not config.some or not config.amounts:
        raise UserError("--fractions, --images: expected some, found none")
    if not config.dataset_name:
        raise UserError("--dataset_name: expected a data set folder with train/ and test/, found nothing")
    if not {"train", "test"} <= set(find_splits(config.dataset_name)):
        raise UserError(
            f"--dataset_name {config.dataset_name}: expected train/ and test/, to test on real images that nothing was"
            f" trained on, found {', '.join(find_splits(config.dataset_name))}; move rows to test/ (data/README.md)"
        )


def drawn_rows(count: int, fraction: float, seed: int, others: int) -> tuple[list[int], list[int], list[int]]:
    """Of `count` rows those that a case learns from, those that it validates on, and up to `others` of the rest.

    Three are drawn at least; what a smaller fraction learns from, a larger one of the same seed does, too, and neither
    validates on it.
    """
    order = rng.permutation(count, "few real", seed)
    drawn = min(count, max(3, round(fraction * count)))
    validation = list(range(1, drawn, VALIDATED))[:MOST_VALIDATED]
    learned = [order[place] for place in range(drawn) if place not in set(validation)]
    return learned, [order[place] for place in validation], order[drawn:][:others]


def stage_rows(split: Split, rows: list[int], folder: Path) -> Split:
    """A data set of some rows of another: links to its files, or copies where the file system has no links.

    Whatever reads this folder cannot see any other row.
    """
    if not any(folder.glob("metadata.*")):
        (folder / "palette.json").unlink(missing_ok=True)
        records = [split[row] for row in rows]
        for record in records:
            for name in (record.image_name, record.mask_name):
                source, target = Path(record.folder, name), folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    continue
                try:
                    os.link(os.path.realpath(source), target)
                except OSError:
                    write_whole(target, partial(shutil.copy2, source))
        split.palette.save(folder / "palette.json")
        write_metadata(folder, ((one.image_name, one.mask_name, one.captions) for one in records))
    return read_split(folder)


def digest(settings: Any, *sources: Any) -> str:
    """10 hexadecimal digits of a stage's dataclass, without its paths, and of what it is trained on or generated by."""
    values = {name: value for name, value in asdict(settings).items() if name not in PLACES}
    return hashlib.sha256(json.dumps([values, *sources], sort_keys=True).encode()).hexdigest()[:10]


@dataclass
class StudyPlan:
    """The stages of a study; each has a folder that is named after the digest of its settings and sources."""

    config: StudyConfig
    rows: dict[Portion, Rows]  # in folders of their own
    test: Split
    chosen: dict[Portion, Choice] = field(default_factory=dict)

    @cached_property
    def base(self) -> str:
        return base_fingerprint(self.config.pretrained_model_name_or_path, self.config.lora)

    @property
    def rule(self) -> Rule:
        return Rule(self.config.validation_steps, self.config.patience)

    @property
    def candidates(self) -> list[Choice]:
        """What real alone chooses from."""
        return [Choice(rate, augment) for rate in self.config.learning_rates
                for augment in self.config.segmenter_augments]  # fmt: skip

    def arms(self, case: Portion) -> list[Arm]:
        """Real alone; synthetic alone; pretraining and mixing, each beside real rows for as long; the upper bound."""
        alone = [Arm("synthetic", amount) for amount in self.config.amounts]
        recipes = [*(Arm("real", after=one) for one in alone), Arm("mixed", alone[-1].images)]
        bound = [BOUND] if self.rows[case].other else []
        return [REAL, *alone, *recipes, *bound, *(Arm("real", like=one) for one in recipes)]

    def controlnet(self, case: Portion) -> TrainConfig:
        """How the ControlNet of a case is trained: as the preset says, on the rows that it learns from.

        It starts from that of the next smaller fraction, whose rows are among these, or from the base.
        """
        config, rows, place = self.config, self.rows[case].learned, self.config.some.index(case.fraction)
        smaller = self.controlnet(case._replace(fraction=config.some[place - 1])) if place else None
        steps = config.controlnet_more_steps if smaller else config.controlnet_steps
        settings = make(
            TrainConfig, config.preset, dataset_name=str(rows.folder), seed=config.seed, fit=config.fit,
            pretrained_model_name_or_path=config.pretrained_model_name_or_path, lora=config.lora,
            cache_dir=str(config.folder / "cache"),
            controlnet_model_name_or_path=smaller.output_dir if smaller else None, resolution=config.resolution,
            augment=config.augment, max_train_steps=steps, checkpointing_steps=100, checkpoints_total_limit=1,
            cache_draws=max(1, min(16, steps * 16 // (4 * len(rows)))),  # each is seen four times or more
            logging_steps=50, report_to="none",
        )  # fmt: skip
        key = digest(settings, rows.fingerprint, self.base, Path(smaller.output_dir).name if smaller else None)
        return replace(settings, output_dir=str(config.folder / "controlnets" / f"{case.name}-{key}"))

    def layouts(self, case: Portion) -> LayoutsConfig | None:
        """How the masks of the synthetic images of a case are made; None: they are those of its rows."""
        config, rows = self.config, self.rows[case].learned
        if not config.layouts:
            return None
        settings = LayoutsConfig(
            dataset_name=str(rows.folder), count=config.amounts[-1], seed=config.seed,
            resolution=config.resolution, fit="stretch" if config.fit == "stretch" else "crop",
        )  # fmt: skip
        folder = config.folder / "layouts" / f"{case.name}-{digest(settings, rows.fingerprint)}"
        return replace(settings, output_dir=str(folder))

    def synthetic(self, case: Portion) -> GenerateConfig:
        """How the synthetic images of a case are generated and filtered: from its rows, by networks of its rows."""
        config, rows, controlnet = self.config, self.rows[case].learned, self.controlnet(case).output_dir
        _, segmenter = self.segmenter(case, REAL, 0)
        layouts = self.layouts(case)
        masks = layouts.count if layouts else len(rows)
        settings = make(
            GenerateConfig, config.preset, split="train", seed=config.seed,
            controls=layouts.output_dir if layouts else str(rows.folder),
            pretrained_model_name_or_path=config.pretrained_model_name_or_path, lora=config.lora,
            segmenter=str(segmenter),
            controlnet_model_name_or_path=controlnet, resolution=config.resolution, fit=config.fit,
            limit=min(config.amounts[-1], masks), replicates=-(-config.amounts[-1] // masks),
            **{name: getattr(config, name) for name in GENERATED if getattr(config, name) != ""},
        )  # fmt: skip
        if layouts and settings.prompt is None:
            settings = replace(settings, prompt=NEW_TEXT)
        key = digest(settings, rows.fingerprint, Path(controlnet).name, segmenter.name,
                     *([Path(layouts.output_dir).name] if layouts else []))  # fmt: skip
        return replace(settings, output_dir=str(config.folder / "images" / f"{case.name}-{key}"))

    def learned_from(self, case: Portion, arm: Arm) -> tuple[Split | None, Split | None]:
        """The real rows of an arm, and the synthetic ones or others in their place; fewer where fewer were kept."""
        real = None if arm.learns == "synthetic" else self.rows[case].learned
        if not arm.images:
            return real, self.rows[case].other if arm == BOUND else None
        made = read_split(self.synthetic(case).output_dir)
        chosen = sorted(rng.permutation(len(made), "synthetic", self.config.seed)[: arm.images])
        return real, replace(made, records=tuple(made[row] for row in chosen))

    def segmenter(
        self, case: Portion, arm: Arm, seed: int, choice: Choice | None = None
    ) -> tuple[SegmenterConfig, Path]:
        """How a segmenter is trained, whatever it learns from, and its folder.

        choice: none: what was chosen for the case; before that the first of all.
        """
        config, rows = self.config, self.rows[case]
        choice = choice or self.chosen.get(case, self.candidates[0])
        settings = SegmenterConfig(
            steps=config.segmenter_steps, batch_size=config.segmenter_batch_size, width=config.segmenter_width,
            resolution=config.segmenter_resolution, seed=100 * case.draw + seed, fit=config.fit,
            learning_rate=choice.learning_rate, architecture=config.segmenter_architecture,
        )  # fmt: skip
        splits = [rows.learned, rows.validation, self.test, *([rows.other] if arm == BOUND and rows.other else [])]
        before = [self.segmenter(case, one, seed, choice)[1].name for one in self.parents(arm)]
        made: list[Any] = [Path(self.synthetic(case).output_dir).name] if arm.images else []
        made += [config.ratio] if arm.learns in MIXED else []
        sources = [arm.name, [split.fingerprint for split in splits], before, made]
        fixed = [choice.augment, self.rule, KEPT_DRAWS, WARM, COOLED, BETTER]
        key = digest(settings, settings.content, sources, fixed)
        words = arm.name.replace(", ", "-").replace(" ", "_")
        return settings, config.folder / "segmenters" / f"{case.name}-{words}-{seed}-{key}"

    def parents(self, arm: Arm) -> list[Arm]:
        """The arms that an arm starts from, or whose length it takes; they come before it."""
        if arm.like:
            return [REAL, *([arm.like.after] if arm.like.after else [])]
        return [] if arm.to_plateau else [REAL, *([arm.after] if arm.after else [])]

    def steps(self, case: Portion, arm: Arm, seed: int) -> int | None:
        """How long an arm is trained, after what it starts from; None: until its plateau.

        Whatever learns from the real rows sees as many of their images as real alone did, in the same order; what is
        like another arm takes as many steps as it in all.
        """
        if arm.to_plateau:
            return None
        real, *before = (self.result(case, one, seed)["steps_taken"] for one in self.parents(arm))
        mixed = (arm.like or arm).learns in MIXED
        return round(real * (1 + self.config.ratio)) if mixed else real + sum(before) * bool(arm.like)

    def result(self, case: Portion, arm: Arm, seed: int, choice: Choice | None = None) -> dict[str, Any]:
        """What a finished segmenter says of its training."""
        found = json.loads((self.segmenter(case, arm, seed, choice)[1] / "config.json").read_text())
        return found.get("segcn", found)  # the former where the network is of transformers

    def choose(self, case: Portion) -> None:
        """Take what served real alone best on the validation rows."""
        self.chosen[case] = max(
            self.candidates, key=lambda choice: self.result(case, REAL, 0, choice)["validation_miou"]
        )

    def seconds(self, stage: str, case: Portion, arm: Arm = REAL) -> float:
        """Of a ControlNet, of a synthetic set or of a segmenter, as estimated, on two slow cores."""
        config = self.config
        area, crop = (config.resolution / 128) ** 2, (config.segmenter_resolution / 64) ** 2
        if stage == "controlnet":
            return (self.controlnet(case).max_train_steps or 0) * TRAINING_STEP * area + 20
        if stage == "synthetic":
            return config.amounts[-1] * config.num_inference_steps * DENOISING_STEP * area * 1.3 + 10
        least = config.patience * config.validation_steps  # until a plateau can be found
        steps = min(config.segmenter_steps, max(USUAL_STEPS, least)) * (2 if arm.like or arm.learns in MIXED else 1)
        return steps * config.segmenter_batch_size * FITTING_SAMPLE * crop + 2
