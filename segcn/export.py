"""The finished ControlNet, where plain diffusers finds it, and on the hub."""

from pathlib import Path

from segcn.claim import RUN_FILE
from segcn.prepare import Run


def finish(run: Run) -> Path:
    """Write the ControlNet where `ControlNetModel.from_pretrained(output_dir)` finds it."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with run.to_paint() as controlnet:
            controlnet.save_pretrained(run.output_dir)
        run.log.say(f"Done: {run.output_dir} opens with ControlNetModel.from_pretrained.")
        if run.config.push_to_hub:
            upload(run)
    accelerator.end_training()
    return run.output_dir


def upload(run: Run) -> None:
    """Put the finished ControlNet, without checkpoints and tracker files, on the hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=run.config.hub_token)
    name = api.create_repo(run.config.hub_model_id or run.output_dir.name, exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=run.output_dir, allow_patterns=["*.json", "*.safetensors"],
                      ignore_patterns=["checkpoint-*", RUN_FILE])  # fmt: skip
