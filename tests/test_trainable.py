"""Promise: each of diffusers' schedules counts optimizer steps, and training starts from a published ControlNet."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.optimization import SchedulerType

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


def test_the_pinned_schedules_are_all_of_diffusers():
    assert {name.partition(":")[0] for name in RATES} == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("name", RATES)
def test_a_schedule_counts_optimizer_steps(name, processes, accumulation, monkeypatch):
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
    run = train(quick(tmp_path / "run", **given, max_train_steps=4))
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in entries if "learning_rate" in entry]
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.5e-3, 0])  # as they are after each step


def test_the_schedule_of_a_run_is_not_accelerates_which_steps_once_a_process(quick, tmp_path):
    assert isinstance(prepare(quick(tmp_path / "run")).schedule, torch.optim.lr_scheduler.LambdaLR)


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
    there, here = ControlNetModel.from_pretrained(published).state_dict(), run.controlnet.state_dict()
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)


@pytest.mark.parametrize("key, value", [
    ("cross_attention_dim", 768), ("in_channels", 4), ("_class_name", "UNet2DConditionModel"),
])  # fmt: skip
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
