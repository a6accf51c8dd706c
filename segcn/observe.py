"""One look at each image: what a segmenter finds in it, its features, its colours; kept on disk, image by image alone.

Every network sees one image at a time, on one core: no number depends on the size of a batch, on the number of threads
or on that of processes, and what was seen before a kill is used after it.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from segcn.atomic import write_whole
from segcn.augment import AUGMENTS
from segcn.boundary import boundary_counts
from segcn.colour import to_lab
from segcn.dataset import PairedDataset, Sample, to_uint8
from segcn.devices import one_core
from segcn.faithfulness import confidence_bins, confusion, pixels_of
from segcn.features import Extractor
from segcn.labels import IGNORE
from segcn.models import weights_digest
from segcn.progress import Progress
from segcn.records import Split
from segcn.segmenter import AnySegmenter
from segcn.text_scores import Reader

FORMAT = 1  # of what is kept; a change of any number here needs another one
SUMMED, JOINED = ("confusion",), ("crops", "crop_classes")  # over the images of a group; the rest is a line an image
LEAST_CROP = 16  # pixels of a class in an image, below which it is not cut out
PARTS = ("faithfulness", "features", "crops", "text")

Seen = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Observer:
    """What looks at images, and where it keeps what it saw."""

    segmenter: AnySegmenter
    extractor: Extractor
    readers: tuple[Reader, ...] = ()
    cache: Path | None = None  # none: nothing is kept
    batch_size: int = 32  # images that are read and kept together; no result depends on it
    process: tuple[int, int] = (0, 1)  # of so many: each looks at its share of the groups

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that change with anything that looks."""
        told = [FORMAT, weights_digest(self.segmenter), self.segmenter.settings, self.extractor.key]
        text = json.dumps([*told, [reader.key for reader in self.readers], torch.__version__])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def observe(self, split: Split, parts: tuple[str, ...] = PARTS, log: Callable[[str], None] = print) -> Seen:
        """What was seen of this process's share of the rows, in their order; UserError names a broken row.

        parts: of PARTS; colours are always seen.
        """
        pairs = self.pairs(split)
        rank, processes = self.process
        groups = [range(first, min(first + self.batch_size, len(pairs)))
                  for first in range(0, len(pairs), self.batch_size)]  # fmt: skip
        told, found = Progress("images seen", len(pairs), log), []
        with one_core() as cores, ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for rows in groups[rank::processes]:
                found.append(self._group(pairs, rows, parts, pool))
                told(rows[-1] + 1)
        return merged(found)

    def pairs(self, split: Split) -> PairedDataset:
        """The rows as they are seen, not augmented."""
        settings = self.segmenter.settings
        return PairedDataset(split, settings["resolution"], AUGMENTS["none"], 0, settings.get("fit", "crop"))

    def _group(self, pairs: PairedDataset, rows: range, parts: tuple[str, ...], pool: ThreadPoolExecutor) -> Seen:
        path = self.cache / "seen" / f"{self.key}-{digest(pairs, rows, parts)}.safetensors" if self.cache else None
        if path and path.is_file():
            with suppress(SafetensorError):  # cut short by a full disk or a power failure: looked at again
                return load_file(path)
        seen = merged([_line(one) for one in pool.map(lambda row: self.look(pairs.sample(row, 0), parts), rows)])
        if path:
            kept = {name: tensor.contiguous() for name, tensor in seen.items()}
            write_whole(path, lambda file: save_file(kept, file))
        return seen

    @torch.no_grad()
    def look(self, sample: Sample, parts: tuple[str, ...]) -> Seen:
        """Everything that is counted of one image."""
        image, wanted = sample.image[None], sample.mask
        seen = {"colour": torch.from_numpy(to_lab(to_uint8(sample.image)).mean((0, 1))), "mask": mask_key(wanted)}
        if "faithfulness" in parts:
            seen |= self._judge(image, wanted)
        if "features" in parts:
            seen["features"] = self.extractor.extract(image)[0].float().cpu()
        if "crops" in parts:
            classes, cut = crops(sample.image, wanted)
            seen["crop_classes"] = classes
            none = torch.zeros(0, len(seen["features"]))
            seen["crops"] = self.extractor.extract(torch.stack(cut)).float().cpu() if cut else none
        if "text" in parts and self.readers:
            told = [value for reader in self.readers for value in reader.read(image, sample.caption)]
            seen["text"] = torch.tensor(told, dtype=torch.float64)
        return seen

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image [1, 3, R, R] in [-1, 1] -> class ids, uint8 [R, R], and the probability of each, [R, R]."""
        logits = self.segmenter(image.to(next(self.segmenter.parameters()).device))
        sure, found = logits.float().softmax(1).max(1)
        return found[0].byte().cpu(), sure[0].cpu()

    def _judge(self, image: torch.Tensor, wanted: torch.Tensor) -> Seen:
        count = self.segmenter.num_classes
        found, sure = self.predict(image)
        confused, labelled = confusion(found, wanted, count), wanted != IGNORE
        bins = confidence_bins(sure[labelled], (found == wanted)[labelled])
        edges = boundary_counts(found, wanted, count)
        return {"confusion": confused, "pixels": pixels_of(confused), "edges": edges, "bins": bins}


def crops(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each class of an image [3, R, R] on grey, its box stretched to a square of R / 2: ids [C], [3, S, S] each."""
    classes, cut, side = [], [], max(32, image.shape[-1] // 2)
    for label in mask.unique().tolist():
        own = mask == label
        if label == IGNORE or own.sum() < LEAST_CROP:
            continue
        (top, bottom), (left, right) = (torch.where(own.any(axis))[0][[0, -1]].tolist() for axis in (1, 0))
        box = torch.where(own, image, 0.0)[:, top : bottom + 1, left : right + 1]
        cut.append(F.interpolate(box[None], (side, side), mode="bilinear", antialias=True)[0])
        classes.append(label)
    return torch.tensor(classes, dtype=torch.int64), cut


def mask_key(mask: torch.Tensor) -> torch.Tensor:
    """A number that two different masks do not share, int64."""
    digest = hashlib.blake2b(mask.contiguous().numpy().tobytes(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def digest(pairs: PairedDataset, rows: range, parts: tuple[str, ...]) -> str:
    """16 hexadecimal digits that change with any byte of the rows' files, their captions and what is looked for."""
    found = hashlib.sha256(json.dumps([parts, pairs.resolution, pairs.fit, pairs.split.palette.fingerprint]).encode())
    for row in rows:
        record = pairs.split[row]
        for path in (record.image, record.mask):
            with suppress(OSError):  # the look at it names the row
                found.update(hashlib.sha256(path.read_bytes()).digest())
        found.update(repr(record.captions).encode())
    return found.hexdigest()[:16]


def merged(found: list[Seen]) -> Seen:
    """Groups one after the other."""
    names = found[0] if found else ()
    return {
        name: torch.stack([one[name] for one in found]).sum(0)
        if name in SUMMED
        else torch.cat([one[name] for one in found])
        for name in names
    }


def _line(seen: Seen) -> Seen:
    """One image as a group of its own."""
    return {name: value if name in SUMMED + JOINED else value[None] for name, value in seen.items()}
