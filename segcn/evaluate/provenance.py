"""What a generated set says of how it was made: settings, filter and captions; and which sets to make beside it."""

import json
import re
import shlex

import numpy as np
import torch

from segcn.data.masks import read_mask
from segcn.data.metadata import Split

RECAPTIONED = {"without_classes": "--without_class_words", "other_captions": "--mix_prompts"}  # of segcn generate


def generation_of(split: Split) -> dict:
    """How a generated set was made, by its generation.json; empty where it has none."""
    path = split.folder / "generation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def starts_from_images(split: Split) -> bool:
    """Whether a generated set was made from real images, which it is near to by design."""
    made = generation_of(split)
    return (made.get("from_images") or 1) < 1 or bool(made.get("inpaint"))


def recaption_command(splits: dict[str, Split], name: str) -> str:
    """The command that generates a set with other captions, as far as the generated set says how it was made."""
    made = generation_of(splits["synthetic"])
    given = {"controls": str(made.get("controls", splits["real"].folder)), "split": made.get("split")}
    given |= {"controlnet_model_name_or_path": made.get("controlnet"), "limit": "48", "output_dir": "DIR"}
    flags = [f"--{flag} {shlex.quote(value)}" for flag, value in given.items() if value]
    return " ".join(["segcn generate", *flags, RECAPTIONED[name]])


def unlike(splits: dict[str, Split], name: str) -> list[str]:
    """Why a set with other captions cannot be compared with the one with captions as they are, a clause each."""
    one, other = (generation_of(splits[each]) for each in ("synthetic", name))
    places = {"rows", "controls", "split", "replicates", "controlnet", "lora", "pretrained_model_name_or_path"}
    free = places | {"segmenter_weights", *(flag.strip("-") for flag in RECAPTIONED.values())}
    changed = sorted(key for key in {*one} & {*other} - free if one[key] != other[key])
    reasons = [f"other settings than those of the images with mask: {', '.join(changed)}"] if changed else []
    if other.get(RECAPTIONED[name].strip("-")) is False:
        reasons.append(f"{splits[name].folder} was generated without {RECAPTIONED[name]}")
    texts = [{record.captions for record in splits[each].records} for each in ("synthetic", name)]
    if name == "without_classes" and texts[1] <= texts[0]:
        reasons.append('nothing was cut from its captions: list what they call the classes as "words" in palette.json')
    return reasons


def filtering_of(split: Split, classes: torch.Tensor, scorer: str) -> dict | None:
    """How a generated set was filtered, by its manifest; None where it was not.

    classes [N, K]: which classes the mask of each of its images holds; scorer: the digest of the segmenter that scores.
    Counts of images requested, kept, regenerated (kept, but not at the first attempt) and dropped; of classes, and of
    words of the prompts, the share of the dropped and of all images that have it, those first that were dropped most.
    """
    made, manifest = generation_of(split), split.folder / "manifest.jsonl"
    if not (made and manifest.is_file()):
        return None
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not any("miou" in record for record in records):
        return None
    dropped = [record for record in records if not record["kept"]]
    lost = [set(np.unique(read_mask(split.folder / record["conditioning_image_file_name"], split.palette)).tolist())
            for record in dropped]  # fmt: skip
    kept = [set(torch.where(one)[0].tolist()) for one in classes]
    found = {label.name: _shares([label.id in one for one in lost], [label.id in one for one in kept])
             for label in split.palette.labels if not label.ignore}  # fmt: skip
    texts = [[set(re.findall(r"\w+", one["text"].lower())) for one in some]
             for some in (dropped, [record for record in records if record["kept"]])]  # fmt: skip
    words = {word: _shares(*([word in one for one in some] for some in texts)) for word in set().union(*texts[0])}
    return {
        "requested": len(records), "kept": len(records) - len(dropped), "dropped": len(dropped),
        "regenerated": sum(record["kept"] and record["attempt"] > 0 for record in records),
        "min_miou": made.get("min_miou"),
        "segmenter_weights": made.get("segmenter_weights"), "scored_by": scorer, "classes": _most_dropped(found),
        "words": _most_dropped(words),
    }  # fmt: skip


def _shares(dropped: list[bool], kept: list[bool]) -> list[float]:
    """Of the dropped and of all images, the share for which it is true."""
    every = [*dropped, *kept]
    return [round(sum(one) / len(one), 3) if one else 0.0 for one in (dropped, every)]


def _most_dropped(shares: dict[str, list[float]]) -> dict[str, list[float]]:
    """The six that are more frequent among the dropped images by 0.1 and more, the most frequent first."""
    gaps = {name: dropped - all_of_them for name, (dropped, all_of_them) in shares.items()}
    return {name: shares[name] for name in sorted(gaps, key=lambda name: (-gaps[name], name))[:6] if gaps[name] >= 0.1}
