"""Promise: wrong settings and data are refused before anything is written; schedules count steps; results load."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType
from PIL import Image
from runs import log_of, weights

from segcn.data.metadata import read_split
from segcn.models.controlnet import make_controlnet
from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.train.setup import make_schedule, prepare
from segcn.utils.errors import UserError

PARTS = [step / 6 for step in range(6)]  # of the way from the end of the warm-up, 2 steps, to the last of 8
RATES = {
    "constant": [1] * 8,
    "constant_with_warmup": [0, 0.5] + [1] * 6,
    "linear": [0, 0.5] + [1 - part for part in PARTS],
    "cosine": [0, 0.5] + [(1 + math.cos(math.pi * part)) / 2 for part in PARTS],
    "cosine_with_restarts": [0, 0.5] + [(1 + math.cos(math.pi * (2 * part % 1))) / 2 for part in PARTS],
    "polynomial": [0, 0.5] + [(1 - part) ** 2 for part in PARTS],
    "piecewise_constant:1:3,0.1:6,0.01": [1] * 3 + [0.1] * 3 + [0.01] * 2,
}


@pytest.fixture(scope="module")
def straight(quick, tmp_path_factory):
    """A finished run of six steps without a break, with validation images."""
    masks = [str(record.mask) for record in read_split(quick("x").dataset_name, "test").records[:2]]
    validation = {"validation_image": masks, "validation_prompt": ["a lake"], "validation_steps": 6}
    return train(quick(tmp_path_factory.mktemp("runs") / "straight", **validation, report_to="tensorboard"))


def test_a_run_records_what_it_did_and_leaves_what_diffusers_opens(straight, random_base, landscapes):
    assert [entry["step"] for entry in log_of(straight)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(entry["loss"]) for entry in log_of(straight))
    assert json.loads((straight / "train_config.json").read_text())["max_train_steps"] == 6
    assert (straight / "palette.json").is_file() and list((straight / "logs").rglob("events*"))
    assert Image.open(straight / "validation" / "step-000006.png").size == (132, 132)
    parts = {"controlnet": ControlNetModel.from_pretrained(straight), "safety_checker": None}
    pipe = StableDiffusionControlNetPipeline.from_pretrained(random_base, **parts, torch_dtype=torch.float32)
    record = read_split(landscapes, "test")[0]
    image = pipe("a lake", image=Image.open(record.mask).convert("RGB"), num_inference_steps=2).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 0


def test_the_old_flags_train_and_resume(quick, tmp_path):
    old = {"preset": "sd15", "use_8bit_adam": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    whole = train(quick(tmp_path / "whole", **old, max_train_steps=4))
    train(quick(tmp_path / "cut", **old, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **old, max_train_steps=4))
    saved = [ControlNetModel.from_pretrained(folder).state_dict() for folder in (cut, whole)]
    assert all(torch.allclose(saved[0][key], saved[1][key], atol=1e-5) for key in saved[0])
    assert [entry["step"] for entry in log_of(cut)] == [1, 2, 3, 4]


def test_a_folder_of_something_else_is_left_alone(quick, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        train(quick(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_balanced_run_that_was_cut_ends_with_the_same_bytes(quick, tmp_path, capsys):
    given = {"class_balance": 0.9, "fit": "pad", "augment": "affine,fill=cover,sided_captions=rewrite"}
    whole = train(quick(tmp_path / "whole", **given))
    printed = capsys.readouterr().out
    assert "Class balance: 12 rows occur" in printed and "of the rows," in printed
    train(quick(tmp_path / "cut", **given, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **given))
    assert weights(cut) == weights(whole) and log_of(cut) == log_of(whole)
    with pytest.raises(UserError, match=r"class_balance: was 0\.9, is 0\.5"):
        train(quick(whole, **given | {"class_balance": 0.5}))
    epoch = {"preset": "sd15", "max_train_steps": None, "num_train_epochs": 1, "class_balance": 1.0}
    assert prepare(quick(tmp_path / "epoch", **epoch)).config.max_train_steps > 12 / 2  # repeated rows count


SCHEDULE = r"--lr_scheduler: expected .*piecewise_constant.*found"
WRONG = [
    ({"augment": "affine,degree=3"}, "augment"), ({"class_balance": 2.0}, "class_balance"),
    ({"proportion_empty_prompts": -0.1}, "proportion_empty_prompts"), ({"logging_steps": 0}, "logging_steps"),
    ({"checkpointing_steps": 0}, "checkpointing_steps"), ({"max_train_samples": -5}, "max_train_samples"),
    ({"lr_scheduler": "cosin"}, SCHEDULE), ({"lr_scheduler": "cosine:3"}, SCHEDULE),
    ({"lr_scheduler": "piecewise_constant"}, SCHEDULE), ({"lr_scheduler": "piecewise_constant:a"}, SCHEDULE),
    ({"lr_scheduler": "piecewise_constant:1:9,0.1:5,0.01"}, SCHEDULE),
    ({"controlnet_model_name_or_path": "nowhere"}, "nowhere: expected a ControlNet"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", WRONG)
def test_what_cannot_be_is_named_before_anything_is_written(quick, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        train(quick(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def break_data(folder, fault):
    """Spoil row 3 of a copy of the data and return what the message must say."""
    metadata, mask = folder / "metadata.csv", folder / "masks" / "000003.png"
    if fault == "missing column":
        metadata.write_text(metadata.read_text().replace("text", "prompt", 1))
        return "column text"
    if fault == "missing file":
        mask.unlink()
    elif fault == "other size":
        Image.open(mask).crop((0, 0, 40, 64)).save(mask)
    else:
        Image.new("RGB", (64, 64), (1, 2, 3)).save(mask)
    return "(row 3)"


@pytest.mark.parametrize("fault", ["missing file", "missing column", "other size", "undeclared color"])
def test_wrong_data_are_refused_before_the_first_step(quick, landscapes, tmp_path, fault):
    data = shutil.copytree(landscapes, tmp_path / "data")
    expected = break_data(data / "train", fault)
    with pytest.raises(UserError) as caught:
        train(quick(tmp_path / "out", dataset_name=str(data)))
    assert expected in str(caught.value) and "metadata.csv" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("name", RATES)
def test_a_schedule_counts_optimizer_steps(name, processes, accumulation, monkeypatch):
    assert {name.partition(":")[0] for name in RATES} == {kind.value for kind in SchedulerType}, "all of diffusers"
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "num_processes", processes)
    accelerator.gradient_accumulation_steps = accumulation
    config = TrainConfig(lr_scheduler=name, max_train_steps=8, lr_warmup_steps=2, lr_num_cycles=2, lr_power=2)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    schedule = make_schedule(config, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    rates = []
    for _ in range(8 * accumulation):
        with accelerator.accumulate(model):
            optimizer.step()
        if accelerator.sync_gradients:
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
    assert rates == pytest.approx(RATES[name], abs=1e-6)


def test_a_training_that_accumulates_follows_its_schedule(quick, tmp_path):
    given = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    entries = log_of(train(quick(tmp_path / "run", **given, max_train_steps=4)))
    rates = [entry["learning_rate"] for entry in entries if "learning_rate" in entry]
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.5e-3, 0])  # as they are after each step


@pytest.fixture(scope="module")
def published(random_base, tmp_path_factory):
    """A ControlNet for the random base with weights of its own, as someone else would publish it."""
    unet = UNet2DConditionModel.from_pretrained(random_base, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64, 96))
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(torch.randn_like(parameter) / 100)
    folder = tmp_path_factory.mktemp("published")
    controlnet.save_pretrained(folder)
    return folder


def test_training_starts_from_a_published_controlnet(quick, published, tmp_path):
    run = prepare(quick(tmp_path / "run", controlnet_model_name_or_path=str(published)))
    assert isinstance(run.schedule, torch.optim.lr_scheduler.LambdaLR)  # not accelerate's: it steps once a process
    there, here = ControlNetModel.from_pretrained(published).state_dict(), run.controlnet.state_dict()
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)


@pytest.mark.parametrize(
    "key, value", [("cross_attention_dim", 768), ("in_channels", 4), ("_class_name", "UNet2DConditionModel")]
)
def test_a_controlnet_that_does_not_fit_is_refused_before_anything_is_written(quick, published, tmp_path, key, value):
    config = json.loads((published / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError) as caught:
        train(quick(tmp_path / "run", controlnet_model_name_or_path=str(other)))
    assert f"its {key} is {value}, and {config[key]} fits" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_new_controlnet_passes_on_masks_that_pytorchs_initialization_fades_and_begins_at_zero(base):
    unet = base.unet
    masks = torch.rand(8, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)  # of large areas
    ours, theirs = make_controlnet(unet), ControlNetModel.from_unet(unet)
    passed = []
    for controlnet in (ours, theirs):
        embedding = controlnet.controlnet_cond_embedding
        embedding.conv_out.register_forward_pre_hook(lambda _, features: passed.append(features[0].std(0).mean()))
        assert (embedding(masks) == 0).all()
    apart = masks.std(0).mean()  # how far masks differ
    assert passed[0] > 0.3 * apart and passed[1] < 1e-3 * apart
