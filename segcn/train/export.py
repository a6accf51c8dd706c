"""What was trained where plain diffusers finds it, its model card README.md, and the upload to the hub."""

import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from segcn.data.metadata import Split
from segcn.data.palette import palette_table
from segcn.models.base import Base, load_base, plain_pipeline
from segcn.models.controlnet import LIGHT_SETTINGS, ControlNet, is_light, merge_light, save_controlnet
from segcn.models.family import FAMILIES, PART_FOLDERS, Family
from segcn.models.lora import LORA_WEIGHTS, changed_layers, has_lora, save_lora
from segcn.train.checkpoint import read_best
from segcn.train.config import TrainConfig
from segcn.train.log import LOG, read_log
from segcn.train.networks import LatentDecoder, Networks, in_full
from segcn.train.setup import Run
from segcn.utils.errors import UserError
from segcn.utils.html import render
from segcn.utils.io import write_text
from segcn.utils.paths import LIGHT_WEIGHTS, WEIGHTS, public_name

CARD_MARK = "<!-- segcn writes this file when a training ends; it leaves one without this line alone. -->"
TAGS = [
    "stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "controlnet", "diffusers-training",
    "segcn",
]  # fmt: skip
LICENSES = {  # by names on the hub
    "stable-diffusion-v1": "creativeml-openrail-m", "stable-diffusion-2": "openrail++",
    "stable-diffusion-xl": "openrail++",
}  # fmt: skip


def finish_training(run: Run) -> Path:
    """Write what was trained where plain diffusers finds it, and its model card.

    A ControlNet is at the root of the run folder, what was trained of the base in its lora/ or base/; of `segcn adapt`
    the LoRA or the base is at the root.
    """
    accelerator, output_dir = run.accelerator, run.output_dir
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with run.averaged() as networks:
            for line in export_networks(run.config, networks, output_dir):
                run.log.say(line)
        if run.config.prediction_type or run.config.rescale_betas_zero_snr:
            run.base.scheduler.save_pretrained(output_dir / "scheduler")  # images must be generated with this one
        kind = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "CPU"
        machine = f"{accelerator.num_processes} x {kind}, precision {accelerator.mixed_precision}"
        if not write_model_card(output_dir, run.config, run.split, run.step, machine, run.base.family):
            run.log.say(f"{output_dir}/README.md is yours: no model card is written.")
    accelerator.end_training()
    if accelerator.is_main_process and run.config.push_to_hub:
        run.log.say(f"Uploaded to {upload(run)}.")
    return output_dir


def export_networks(config: TrainConfig, networks: Networks, output_dir: Path) -> list[str]:
    """Write the trained networks; a line for each, which says how it is used."""
    controlnet, merge, said = networks.get("controlnet"), config.merge, []
    lora, folder, both = output_dir, output_dir, f"segcn generate --controlnet_model_name_or_path {output_dir}"
    if isinstance(controlnet, ControlNet):
        if has_lora(controlnet) and merge:
            export(controlnet, output_dir / "lora")
            export(merge_light(output_dir / "lora", reopen_base(config, config.lora).unet), output_dir)
        else:
            export(controlnet, output_dir)
        opens = f"{output_dir} opens with {type(controlnet).__name__}.from_pretrained"
        if is_light(output_dir):
            opens = f"{output_dir} is a light ControlNet, which its README.md opens; --merge makes it a full one"
        said.append(f"Done: {opens}.")
        lora, folder = output_dir / "lora", output_dir / "base"
    if "lora" in config.trains:
        lora = output_dir / "lora" if merge else lora
        save_lora(output_dir / ".lora", networks)
        lora.mkdir(exist_ok=True)
        os.replace(output_dir / ".lora" / LORA_WEIGHTS, lora / LORA_WEIGHTS)
        (output_dir / ".lora").rmdir()
        if said:
            said.append(f"Its LoRA is in {lora}: use both by {both} --lora {lora}")
        elif not merge:
            said.append(f"Done: {output_dir} opens with pipe.load_lora_weights; segcn train takes it as --lora.")
    if in_full(config) or (merge and not said):
        write_base(config, networks, folder, lora if merge and not said else None)
        flag = "--pretrained_model_name_or_path"
        if said:
            said.append(f"Its base is in {folder}: use both by {both} {flag} {folder}")
        else:
            said.append(f"Done: {folder} opens with DiffusionPipeline.from_pretrained; segcn takes it as {flag}.")
    return said


def write_base(config: TrainConfig, networks: Networks, folder: Path, lora: Path | None = None) -> None:
    """Write the base with the weights that were trained, in float32, as a folder that plain pipelines open."""
    base = reopen_base(config, str(lora) if lora else config.lora)
    assert base.vae is not None
    if lora is None:
        parts: dict[str, torch.nn.Module] = {base.family.part: base.unet, "vae": LatentDecoder(base.vae)}
        for part, network in networks.items():
            if part in parts:
                parts[part].load_state_dict(changed_layers(network), strict=False)
    for network in (base.unet, base.vae):
        network.to(memory_format=torch.contiguous_format)
    staged = folder / ".base"
    shutil.rmtree(staged, ignore_errors=True)
    plain_pipeline(base, base.scheduler).save_pretrained(staged)
    for path in [staged / "model_index.json", *staged.rglob("config.json")]:  # without the path that it came from
        written = json.loads(path.read_text())
        written.pop("_name_or_path", None)
        path.write_text(json.dumps(written, indent=2) + "\n")
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "model_index.json"):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)
    staged.rmdir()


def reopen_base(config: TrainConfig, lora: str | None) -> Base:
    """The base as it was before the training, in float32, on the CPU; lora: what is added to its weights."""
    hub = {"revision": config.revision, "variant": config.variant}
    name, vae = config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path
    return load_base(name, "cpu", torch.float32, config.tokenizer_name, None, lora, vae, **hub)


def export(controlnet: ControlNet, folder: Path) -> None:
    """config.json, without the path that the ControlNet came from, and safetensors: each file is whole or not there.

    What is there of a light one goes where a full one is written, and the other way.
    """
    staged = folder / ".export"
    save_controlnet(controlnet, staged)
    config = json.loads((staged / "config.json").read_text())
    config.pop("_name_or_path", None)
    write_text(staged / "config.json", json.dumps(config, indent=2) + "\n")
    written = {path.name for path in staged.iterdir()}
    for name in sorted(written, key=lambda name: (name.endswith(".safetensors"), name)):
        os.replace(staged / name, folder / name)
    for name in {WEIGHTS, LIGHT_WEIGHTS, LIGHT_SETTINGS} - written:
        (folder / name).unlink(missing_ok=True)
    staged.rmdir()


def write_model_card(
    output_dir: Path, config: TrainConfig, split: Split, step: int, machine: str, family: Family = FAMILIES[0]
) -> bool:
    """Write README.md to a run folder, of paths only their last part; False where the user's own is there.

    family: the base's, by which the code on the card opens it.
    """
    path = output_dir / "README.md"
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    folder, name, sheet = config.pretrained_model_name_or_path, public_name(output_dir), newest_sheet(output_dir)
    base, trains = public_name(folder), config.trains
    lora = "lora" in trains and not config.merge
    kinds = {"decoder": "the decoder of its U-Net", "all": "its U-Net", "vae_decoder": "the decoder of its autoencoder"}
    what = f"A LoRA for {base}." if lora else f"{base} with a LoRA in its weights."
    changed = [kinds[kind] for kind in trains if kind in kinds]
    text = render(
        f"train/templates/{'card' if 'controlnet' in trains else 'adapted_card'}.md",
        lora=lora,
        light=config.controlnet == "lora" and not config.merge,
        what=f"{base}, of which {changed[0]} was trained further." if changed else what,
        trained=changed[0] if changed else f"rank {config.lora_rank}, layers {', '.join(config.lora_targets)}",
        mark=CARD_MARK,
        name=name,
        base=base,
        family=family,
        controlnet=family.controlnet.__name__,
        repository=config.hub_model_id or name,
        prompt=(config.validation_prompt or ["a text"])[0].replace('"', "'"),
        sheet=sheet and sheet.relative_to(output_dir).as_posix(),
        classes=palette_table(split.palette),
        data_set=split.folder.absolute().parent.name if split.folder.name == "train" else split.folder.absolute().name,
        split=split,
        config=config,
        step=step,
        machine=machine,
        versions=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
        figures=card_figures(output_dir),
    )
    data = ModelCardData(license=license_of(folder), library_name="diffusers", base_model=base)
    tags = TAGS if "controlnet" in trains else [tag for tag in TAGS if tag != "controlnet"] + ["lora"] * lora
    card = populate_model_card(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"), tags=list(tags))
    write_text(path, str(card))
    return True


def license_of(base: str) -> str:
    """The license in the front matter of the base's README.md, or of a known name on the hub, else "other"."""
    readme = Path(base, "README.md")
    if readme.is_file():
        front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
        return found[1] if found else "other"
    return next((license for name, license in LICENSES.items() if name in base and not Path(base).exists()), "other")


def newest_sheet(output_dir: Path) -> Path | None:
    """The last validation image of a run, where there is one."""
    sheets = {int(path.stem[5:]): path for path in output_dir.glob("validation/step-*.png") if path.stem[5:].isdigit()}
    return sheets[max(sheets)] if sheets else None


def card_figures(output_dir: Path) -> list[tuple[str, str]]:
    """The last loss, and how well the images obey the masks, as far as it was measured."""

    def numbers(scores: dict) -> list[tuple[str, str]]:  # those one level deeper too
        deeper = {key: value.items() for key, value in scores.items() if isinstance(value, dict)}
        flat = [*scores.items(), *((f"{key} {name}", value) for key, inner in deeper.items() for name, value in inner)]
        return [(key, f"{value:.4g}") for key, value in flat if isinstance(value, int | float)]

    entries, best = read_log(output_dir / LOG), read_best(output_dir) or {}
    rows = [("last logged loss", f"{entry['loss']:.4g}") for entry in entries if "loss" in entry][-1:]
    for entry in [entry for entry in entries if isinstance(entry.get("faithfulness"), dict)][-1:]:
        rows += [(f"{key}, step {entry['step']}", text) for key, text in numbers(entry["faithfulness"])]
    return rows + [(f"best {key}, {best.get('checkpoint')}", text) for key, text in numbers(best) if key != "step"]


def upload(run: Run) -> str:
    """Put the finished ControlNet, without checkpoints, logs and settings, on the hub; the repository's name."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api, output_dir = HfApi(token=run.config.hub_token), run.output_dir
    name, sheet = run.config.hub_model_id or output_dir.absolute().name, newest_sheet(output_dir)
    published = [*output_dir.glob("diffusion_pytorch_model*.safetensors*"), *([sheet] if sheet else [])]
    published += output_dir.glob("scheduler/scheduler_config.json")
    small = (LORA_WEIGHTS, LIGHT_WEIGHTS, LIGHT_SETTINGS)
    published += [path for part in ("", "lora/") for name in small for path in output_dir.glob(f"{part}{name}")]
    if "controlnet" not in run.config.trains or (output_dir / "base").is_dir():
        own = output_dir if "controlnet" not in run.config.trains else output_dir / "base"
        published += [*own.glob("model_index.json"), *(path for part in PART_FOLDERS for path in own.glob(f"{part}/*"))]
    files = sorted(path.relative_to(output_dir).as_posix() for path in published)
    try:
        name = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            folder_path=output_dir,
            allow_patterns=["config.json", "README.md", "palette.json", *files],
            commit_message=f"{', '.join(run.config.trains)} after {run.step} steps",
        )
    except (OSError, ValueError, HTTPError) as error:  # offline, no token, no such name: the hub's errors are these
        raise UserError(
            f"--push_to_hub {name}: {type(error).__name__}: {str(error).splitlines()[0]}\n"
            f"What was trained is in {output_dir}. Once `hf auth login` is done and the hub answers, rerun the"
            " same command to upload it, without training again"
        ) from None
    return name
