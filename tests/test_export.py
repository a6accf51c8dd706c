"""Promise: a finished run says what it is, opens in plain diffusers as its card says, and uploads nothing private."""

import fnmatch
import json
import re
import shutil
from dataclasses import replace
from unittest.mock import Mock, call

import huggingface_hub
import pytest
import torch
from diffusers import ControlNetModel
from huggingface_hub import ModelCard
from PIL import Image
from runs import tree

from segcn.data.metadata import read_split
from segcn.train.export import CARD_MARK, export, license_of, write_model_card
from segcn.train.loop import train
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def config(quick, tmp_path_factory):
    """The settings of a run of two steps with a validation image and every private thing that settings can hold."""
    mask = str(read_split(quick("x").dataset_name, "test").records[0].mask)
    validation = {"validation_image": [mask], "validation_prompt": ["a lake at dusk"], "validation_steps": 2}
    hub = {"hub_token": "hf_secret", "hub_model_id": "someone/lakes"}
    folder = tmp_path_factory.mktemp("private") / "lakes"
    return quick(folder, max_train_steps=2, class_weighting=0.5, **validation, **hub)


@pytest.fixture(scope="module")
def run(config):
    """The folder of that run."""
    return train(config)


def test_the_card_says_what_the_run_is(run, config):
    card = ModelCard.load(run / "README.md")
    assert card.data.license == license_of(config.pretrained_model_name_or_path)
    assert (card.data.library_name, card.data.base_model) == ("diffusers", "base")
    assert {"controlnet", "stable-diffusion", "diffusers-training", "segcn"} <= set(card.data.tags)
    split = read_split(config.dataset_name, "train")
    for label in split.palette.labels:
        assert f"| {label.id} | {label.name} | `#{bytes(label.color).hex()}` |" in card.text
    loss = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["loss"]
    for words in ("| rows | 12 |", split.fingerprint, "64 x 64", "`affine`", "| steps | 2 |", "CPU", "| 0.5 |"):
        assert words in card.text, words
    assert f"| last logged loss | {loss:.4g} |" in card.text
    assert "(validation/step-000002.png)" in card.text


def test_the_code_on_the_card_generates(run, config, random_base, landscapes, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.split("\n")) <= 8
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "lakes").symlink_to(run)
    (tmp_path / "base").symlink_to(random_base)
    Image.open(read_split(landscapes, "test")[0].mask).convert("RGB").save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.replace("image=Image", "num_inference_steps=2, image=Image"), found)
    assert found["image"].size == (64, 64)


def test_a_readme_of_the_users_own_is_left_alone(run, config, tmp_path):
    split = read_split(config.dataset_name, "train")
    assert write_model_card(tmp_path, config, split, 2, "CPU") and write_model_card(tmp_path, config, split, 3, "CPU")
    assert "| steps | 3 |" in (tmp_path / "README.md").read_text()
    mine = (tmp_path / "README.md").read_text().replace(CARD_MARK, "")
    (tmp_path / "README.md").write_text(mine)
    assert not write_model_card(tmp_path, config, split, 4, "CPU") and (tmp_path / "README.md").read_text() == mine


def test_the_card_shows_how_well_the_images_follow_their_masks(config, tmp_path):
    score = {"miou": 0.5, "of_ceiling": 0.61, "per_class": {"sky": 0.912, "sun": None}}
    lines = [{"step": 1, "loss": 0.25}, {"step": 2, "faithfulness": score}, {"step": 2, "loss": 0.125}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "best.json").write_text(json.dumps({"step": 2, "checkpoint": "checkpoint-2", "miou": 0.5}))
    write_model_card(tmp_path, config, read_split(config.dataset_name, "train"), 2, "CPU")
    text = (tmp_path / "README.md").read_text()
    for row in ("miou, step 2 | 0.5", "per_class sky, step 2 | 0.912", "best miou, checkpoint-2 | 0.5", "loss | 0.125"):
        assert row in text


@pytest.mark.parametrize(("base", "expected"), [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"), ("someone/model", "other"),
])  # fmt: skip
def test_the_license_is_that_of_the_base(tmp_path, base, expected):
    assert license_of(base) == expected and license_of(str(tmp_path)) == "other"
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# A base\n")
    assert license_of(str(tmp_path)) == "apache-2.0"


def test_the_upload_is_weights_card_palette_and_the_newest_sheet_without_paths_and_tokens(run, config, monkeypatch):
    hub = Mock()
    hub.return_value.create_repo.return_value.repo_id = "someone/lakes"
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    train(replace(config, push_to_hub=True))
    assert hub.call_args == call(token="hf_secret")
    assert hub.return_value.create_repo.call_args.args == ("someone/lakes",)
    given = hub.return_value.upload_folder.call_args.kwargs
    assert given["repo_id"] == "someone/lakes"
    texts, files = ["README.md", "config.json", "palette.json"], tree(given["folder_path"])
    taken = {name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in given["allow_patterns"])}
    assert taken == {*texts, "diffusion_pytorch_model.safetensors", "validation/step-000002.png"}
    private = [str(run.parent), config.dataset_name, str(config.pretrained_model_name_or_path), "hf_secret"]
    assert [(name, word) for name in texts for word in private if word in (run / name).read_text()] == []


def test_a_hub_that_does_not_answer_leaves_the_finished_controlnet(run, config, tmp_path):
    out = shutil.copytree(run, tmp_path / "lakes")
    (out / "config.json").unlink()
    offline = replace(config, output_dir=str(out), push_to_hub=True)
    with pytest.raises(UserError, match=f"someone/lakes: OfflineModeIsEnabled.*\n.*is in {out}. .*same command"):
        train(offline)
    assert ControlNetModel.from_pretrained(out).config.conditioning_channels == 3


def test_a_controlnet_is_written_without_the_path_that_it_came_from(run, tmp_path):
    controlnet = ControlNetModel.from_pretrained(run)
    assert str(run) in controlnet.to_json_string()
    export(controlnet, tmp_path)
    assert str(run) not in (tmp_path / "config.json").read_text()
    again = ControlNetModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in controlnet.state_dict().items())
