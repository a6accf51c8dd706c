"""The finished ControlNet, where plain diffusers finds it, with its model card, and on the hub."""

import json
import os
from pathlib import Path

import torch
from diffusers import ControlNetModel

from segcn.atomic import write_text
from segcn.errors import UserError
from segcn.modelcard import newest_sheet, write_card
from segcn.prepare import Run


def finish(run: Run) -> Path:
    """Write the ControlNet where `ControlNetModel.from_pretrained(output_dir)` finds it, and its model card."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with run.to_paint() as controlnet:
            export(controlnet, run.output_dir)
        if run.config.prediction_type or run.config.rescale_betas_zero_snr:
            run.base.scheduler.save_pretrained(run.output_dir / "scheduler")  # it must be painted under this one
        run.log.say(f"Done: {run.output_dir} opens with ControlNetModel.from_pretrained.")
        if not write_card(run.output_dir, run.config, run.split, run.step, machine(accelerator)):
            run.log.say(f"{run.output_dir}/README.md is yours: no model card is written.")
    accelerator.end_training()
    if accelerator.is_main_process and run.config.push_to_hub:
        run.log.say(f"Uploaded to {upload(run)}.")
    return run.output_dir


def export(controlnet: ControlNetModel, folder: Path) -> None:
    """config.json, without the path that the ControlNet came from, and safetensors: each file is whole or not there."""
    staged = folder / ".export"
    controlnet.save_pretrained(staged)
    config = json.loads((staged / "config.json").read_text())
    config.pop("_name_or_path", None)
    write_text(staged / "config.json", json.dumps(config, indent=2) + "\n")
    for path in sorted(staged.iterdir()):
        os.replace(path, folder / path.name)
    staged.rmdir()


def machine(accelerator) -> str:
    """Number and kind of what it was trained on, and the precision of the arithmetic."""
    kind = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "CPU"
    return f"{accelerator.num_processes} x {kind}, precision {accelerator.mixed_precision}"


def upload(run: Run) -> str:
    """Put the finished ControlNet, without checkpoints, logs and settings, on the hub; the repository's name."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api = HfApi(token=run.config.hub_token)
    name = run.config.hub_model_id or run.output_dir.absolute().name
    try:
        name = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            folder_path=run.output_dir,
            allow_patterns=published(run.output_dir),
            commit_message=f"ControlNet after {run.step} steps",
        )
    except (OSError, ValueError, HTTPError) as error:  # offline, no token, no such name: the hub's errors are these
        raise UserError(
            f"--push_to_hub {name}: {type(error).__name__}: {str(error).splitlines()[0]}\n"
            f"The finished ControlNet stands in {run.output_dir}; once `hf auth login` is done and the hub answers, the"
            " same command uploads it, without training again"
        ) from None
    return name


def published(output_dir: Path) -> list[str]:
    """The files of a run folder that go to the hub."""
    weights = [path.name for path in output_dir.glob("diffusion_pytorch_model*.safetensors*")]
    sheet = newest_sheet(output_dir)
    sheets = [sheet.relative_to(output_dir).as_posix()] if sheet else []
    schedule = [f"{path.parent.name}/{path.name}" for path in output_dir.glob("scheduler/scheduler_config.json")]
    return ["config.json", *sorted(weights), *schedule, "README.md", "palette.json", *sheets]
