"""The model card of a run, README.md in its folder: what it paints from, the data, the training and how good it is."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from segcn.atomic import write_text
from segcn.best import BEST
from segcn.labels import Palette
from segcn.records import Split
from segcn.train_config import TrainConfig
from segcn.watch import LOG, read_log

MARK = "<!-- segcn writes this file when a training ends; it leaves one without this line alone. -->"
TAGS = [
    "stable-diffusion",
    "stable-diffusion-diffusers",
    "text-to-image",
    "diffusers",
    "controlnet",
    "diffusers-training",
    "segcn",
]
LICENSES = {"stable-diffusion-v1": "creativeml-openrail-m", "stable-diffusion-2": "openrail++"}  # by names on the hub
USE = """```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
controlnet = ControlNetModel.from_pretrained("{name}")
pipe = StableDiffusionControlNetPipeline.from_pretrained("{base}", controlnet=controlnet).to(controlnet.dtype)
image = pipe("{prompt}", image=Image.open("mask.png").convert("RGB")).images[0]  # a mask in the colours below
```"""


def write_card(output_dir: Path, config: TrainConfig, split: Split, step: int, machine: str) -> bool:
    """Write README.md to a run folder; False where the user's own stands there."""
    path = output_dir / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    base = config.pretrained_model_name_or_path
    data = ModelCardData(license=license_of(base), library_name="diffusers", base_model=public_name(base))
    text = card_text(output_dir, config, split, step, machine)
    card = populate_model_card(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"), tags=list(TAGS))
    write_text(path, str(card))
    return True


def card_text(output_dir: Path, config: TrainConfig, split: Split, step: int, machine: str) -> str:
    """The card below its front matter; of paths only the last folder's name."""
    base, name = public_name(config.pretrained_model_name_or_path), public_name(output_dir)
    prompt = (config.validation_prompt or ["a text"])[0].replace('"', "'")
    sheet = newest_sheet(output_dir)
    link = sheet and f"![Masks, and below each what was painted from it]({sheet.relative_to(output_dir).as_posix()})"
    parts = [
        MARK,
        f"# {name}",
        f"A ControlNet for {base}: it paints from a segmentation mask in the colours below and a text.",
        link,
        USE.format(name=config.hub_model_id or name, base=base, prompt=prompt),
        "## Classes",
        palette_table(split.palette),
        "## Data",
        table(data_rows(config, split)),
        "## Training",
        table(training_rows(config, step, machine)),
        "## Figures",
        table(figure_rows(output_dir)),
    ]
    return "\n\n".join(part for part in parts if part)


def public_name(path: str | Path) -> str:
    """A name on the hub as it is; of a folder its own name, without the folders above it."""
    local = Path(path).exists() or Path(path).is_absolute() or str(path).startswith((".", "~"))
    return Path(path).absolute().name if local else str(path)


def license_of(base: str) -> str:
    """The license in the front matter of the base's README.md, or of a known name on the hub, else "other"."""
    readme = Path(base, "README.md")
    if readme.is_file():
        front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
        return found[1] if found else "other"
    return next((license for name, license in LICENSES.items() if name in base and not Path(base).exists()), "other")


def newest_sheet(output_dir: Path) -> Path | None:
    """The last validation picture of a run, where there is one."""
    sheets = {int(path.stem[5:]): path for path in output_dir.glob("validation/step-*.png") if path.stem[5:].isdigit()}
    return sheets[max(sheets)] if sheets else None


def palette_table(palette: Palette) -> str:
    """Id, name and colour of every label."""
    rows = ["| id | name | colour |", "|---|---|---|"]
    for label in palette.labels:
        name = label.name.replace("|", "\\|") + (" (ignored)" if label.ignore else "")
        rows.append(f"| {label.id} | {name} | `#{''.join(f'{value:02x}' for value in label.colour)}` |")
    return "\n".join(rows)


def data_rows(config: TrainConfig, split: Split) -> list[tuple[str, str]]:
    """What it was trained on."""
    folder = split.folder.absolute()
    rows = [
        ("data set", folder.parent.name if folder.name == "train" else folder.name),
        ("rows", f"{len(split):,}"),
        ("fingerprint", f"`{split.fingerprint}`"),
        ("resolution", f"{config.resolution} x {config.resolution}, --fit {config.fit}"),
        ("augmentation", f"`{config.augment}`"),
    ]
    return rows + _given(config, "class_balance", "proportion_empty_prompts", "proportion_empty_controls")


def training_rows(config: TrainConfig, step: int, machine: str) -> list[tuple[str, str]]:
    """How it was trained."""
    rows = [
        ("steps", f"{step:,}"),
        ("batch", f"{config.train_batch_size} rows x {config.gradient_accumulation_steps} micro-batches a process"),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler}, warm-up {config.lr_warmup_steps} steps"),
        ("seed", str(config.seed)),
        ("machine", machine),
        ("versions", f"diffusers {diffusers.__version__}, torch {torch.__version__}"),
    ]
    return rows + _given(config, "snr_gamma", "class_weighting", "use_ema", "scale_lr", "use_8bit_adam")


def figure_rows(output_dir: Path) -> list[tuple[str, str]]:
    """The last loss, and how well the pictures obey the masks, as far as the run folder tells."""
    entries, rows = read_log(output_dir / LOG), []
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    rows += [("last logged loss", f"{losses[-1]:.4g}")] if losses else []
    scored = [entry for entry in entries if isinstance(entry.get("faithfulness"), dict)]
    if scored:
        rows += [(f"{key}, step {scored[-1]['step']}", text) for key, text in _numbers(scored[-1]["faithfulness"])]
    best = output_dir / BEST
    if best.is_file():
        told = json.loads(best.read_text())
        rows += [(f"best {key}, {told.get('checkpoint')}", text) for key, text in _numbers(told) if key != "step"]
    return rows


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns in Markdown, or nothing."""
    lines = [f"| {left} | {str(right).replace('|', chr(92) + '|')} |" for left, right in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if rows else ""


def _given(config: TrainConfig, *names: str) -> list[tuple[str, str]]:
    """The settings among these that are on."""
    return [(name, str(getattr(config, name))) for name in names if getattr(config, name)]


def _numbers(scores: dict) -> list[tuple[str, str]]:
    """Name and text of every number in it, those one level deeper too."""
    deeper = {key: value.items() for key, value in scores.items() if isinstance(value, dict)}
    flat = [*scores.items(), *((f"{key} {name}", value) for key, inner in deeper.items() for name, value in inner)]
    return [(key, f"{value:.4g}") for key, value in flat if isinstance(value, int | float)]
