"""Promise: the loss is the published one, weighted as given and replaceable; nothing non-finite reaches the weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from safetensors import safe_open
from torch.utils.data import default_collate

from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import load_pipeline
from segcn.models.base import encode_moments, encode_text, sample_latents
from segcn.models.controlnet import make_controlnet
from segcn.models.noise import Diffusion
from segcn.train import loop, setup
from segcn.train.batches import Plan
from segcn.train.checkpoint import averaged
from segcn.train.config import TrainConfig
from segcn.train.log import read_log
from segcn.train.loop import step_losses, train
from segcn.train.loss import FiniteCheck, diffusion_loss, min_snr_weights, valid_cells
from segcn.train.setup import make_noise_schedule, prepare
from segcn.utils.args import make
from segcn.utils.errors import UserError


def fake_base(prediction_type):
    schedule = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    return SimpleNamespace(scheduler=schedule, process=Diffusion(schedule))


@pytest.mark.parametrize("cache", ["latents", "none"])
def test_a_training_step_written_out_is_the_packages_bit_for_bit(quick, tmp_path, cache):
    run = prepare(quick(tmp_path / "run", train_batch_size=4, cache=cache, augment="affine,degrees=30"))
    keys = next(iter(Plan(rows=12, seed=0, start=0, stop=1, accumulate=1, batch=4)))  # (visit, row) of step 1
    batch, base, controlnet = default_collate([run.examples[key] for key in keys]), run.base, run.controlnet

    moments = batch["moments"] if cache == "latents" else encode_moments(base.vae, batch["image"])  # [B,2C,h,w]
    latents = sample_latents(base.vae_config, moments, batch["posterior"])  # [B,C,h,w]
    noise, timestep, control = batch["noise"], batch["timestep"], batch["control"]  # control [B,3,H,W] in [0,1]
    noisy = base.scheduler.add_noise(latents, noise, timestep)
    text = batch["text"] if cache == "latents" else encode_text(base, batch["caption"])  # [B,L,D]
    down, middle = controlnet(noisy, timestep, text, controlnet_cond=control, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    prediction = base.unet(noisy, timestep, text, **residuals).sample
    target = base.scheduler.get_velocity(latents, noise, timestep) if base.process.predicts == "v" else noise
    error = (prediction - target).square().mean(1)  # [B,h,w]
    valid = batch["cells"]  # bool [B,h,w]: cells whose pixels are all in frame
    losses = (error * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    losses.mean().backward()

    assert not valid.all()
    norm = torch.nn.utils.get_total_norm([p.grad for p in controlnet.parameters()])
    assert torch.equal(losses, step_losses(run, batch))
    first = read_log(train(run.config) / "log.jsonl")[0]
    assert first["loss"] == losses.mean().item() and first["gradient_norm"] == pytest.approx(norm.item())


def test_loss_augmentation_and_controlnet_can_be_functions_of_ones_own(quick, tmp_path):
    made = []

    def twice_the_loss(prediction, target, valid, weights=None):
        return 2 * diffusion_loss(prediction, target, valid, weights)

    def own_controlnet(unet):
        made.append(make_controlnet(unet))
        return made[-1]

    plain = train(quick(tmp_path / "plain", max_train_steps=1))
    custom = train(quick(tmp_path / "custom", max_train_steps=1), loss=twice_the_loss, make_controlnet=own_controlnet)
    losses = [read_log(folder / "log.jsonl")[0]["loss"] for folder in (plain, custom)]
    assert losses[1] == 2 * losses[0] and len(made) == 1
    with pytest.raises(UserError, match=r"loss: was '\w{16}', is None"):
        train(quick(tmp_path / "custom", max_train_steps=2), make_controlnet=own_controlnet)
    changes = {"light": None, "dark": lambda image, mask, seed: (image // 2, mask)}
    runs = [prepare(quick(tmp_path / name, cache_draws=1), augment=given) for name, given in changes.items()]
    light, dark = (run.examples[0, 0]["moments"] for run in runs)
    assert not torch.equal(light, dark) and runs[0].examples.cache.folder != runs[1].examples.cache.folder


def test_the_loss_is_the_weighted_mean_over_cells_whose_pixels_are_all_in_frame():
    prediction, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    valid = torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[0, :3] = True
    loss = diffusion_loss(prediction, target, valid)
    expected = (prediction[0, :, :3] - target[0, :, :3]).square().mean()
    assert torch.allclose(loss[0], expected) and loss[1] == 0
    assert torch.equal(loss, diffusion_loss(torch.where(valid[:, None], prediction, 1e6), target, valid))
    assert torch.equal(loss, diffusion_loss(prediction, target, valid, torch.ones(2, 8, 8)))
    error, valid = torch.ones(1, 4, 2, 2), torch.tensor([[[True, True], [True, False]]])
    weights = torch.tensor([[[3.0, 0.0], [0.5, 9.0]]])
    assert diffusion_loss(error, 0 * error, valid, weights).item() == pytest.approx(3.5 / 3)
    pixels = torch.ones(1, 16, 16, dtype=torch.bool)
    pixels[0, 7, 8] = False
    assert valid_cells(pixels, 8).tolist() == [[[True, False], [True, True]]]


@pytest.mark.parametrize("predicts_v", [False, True])
def test_min_snr_makes_the_loss_one_of_clean_images_with_a_weight_of_at_most_gamma(predicts_v):
    snr = compute_snr(fake_base("epsilon").scheduler, torch.tensor([0, 300, 600, 999]))
    weight_of_clean = snr + 1 if predicts_v else snr  # what an error of the clean image weighs in the plain loss
    weights = min_snr_weights(snr, 5.0, predicts_v) * weight_of_clean
    assert torch.allclose(weights, snr.clamp(max=5.0))


def test_the_noise_schedule_is_the_bases_with_zero_terminal_snr_or_another_prediction_type_on_request():
    config = TrainConfig(rescale_betas_zero_snr=True)
    assert make_noise_schedule(config, fake_base("v_prediction")).alphas_cumprod[-1].item() < 1e-6
    with pytest.raises(UserError, match="predicts v"):
        make_noise_schedule(config, fake_base("epsilon"))
    for given, expected in ((None, "epsilon"), ("v_prediction", "v_prediction")):
        schedule = make_noise_schedule(TrainConfig(prediction_type=given), fake_base("epsilon"))
        assert schedule.config.prediction_type == expected


def test_the_average_follows_the_weights_and_leaves_them_as_they_were():
    layer = torch.nn.Linear(2, 2, bias=False)
    ema = EMAModel(layer.parameters(), decay=0.5)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        ema.step(layer.parameters())  # the first step takes the weights over
        layer.weight.fill_(2.0)
        for _ in range(5):
            ema.step(layer.parameters())
    with averaged(list(layer.parameters()), ema):
        assert (layer.weight > 1.5).all() and (layer.weight < 2.0).all()
    assert (layer.weight == 2.0).all()


def test_fused_and_plain_adam_agree():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
        config = TrainConfig(fused_adam=fused, learning_rate=1e-2)
        optimizer = setup.make_optimizer(config, list(layer.parameters()), SimpleNamespace(num_processes=1))
        for step in range(5):
            layer(torch.arange(8.0) + step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(layer.weight)
    assert torch.allclose(*results, atol=1e-6)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("scaler", "rows", "losses", "norm", "said"), [
    (None, [4, 7], [0.1, NAN], NAN, "step 12: .*the loss of row 7 .*nothing was updated"),
    (None, [5], [0.1], INF, r"the gradient of rows \[5\]"),
    (SimpleNamespace(get_scale=lambda: 2.0**16), [4], [INF], INF, "the loss of row 4"),
    (SimpleNamespace(get_scale=lambda: 2.0**16), [4], [0.1], INF, None),  # an overflow is left to the scaler
])  # fmt: skip
def test_a_loss_or_gradient_that_is_not_finite_is_reported_with_step_and_rows(
    tmp_path, scaler, rows, losses, norm, said
):
    tested = FiniteCheck(SimpleNamespace(scaler=scaler, gather=torch.clone, is_main_process=True), tmp_path)

    def step(number, rows, losses, norm):
        tested.add(torch.tensor(rows), torch.tensor(losses))
        tested.check(torch.tensor(norm), number)

    step(11, [3], [0.1], 1.0)  # this one is fine, and its row is forgotten
    if said is None:
        return step(12, rows, losses, norm)
    with pytest.raises(UserError, match=said):
        step(12, rows, losses, norm)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    bad = [row for row, loss in zip(rows, losses, strict=True) if loss != 0.1]
    assert (report["step"], report["rows"], report["rows_with_bad_loss"]) == (12, rows, bad)


def test_a_run_with_a_bad_loss_stops_before_its_update(quick, tmp_path, monkeypatch):
    config, seen = quick(tmp_path / "out", max_train_steps=4, checkpointing_steps=2), {}

    def spoiled(run, batch):
        if run.step == 3:
            seen.update(run=run, before=[weight.detach().clone() for weight in run.controlnet.parameters()])
        return step_losses(run, batch) * (float("nan") if run.step == 3 else 1.0)

    monkeypatch.setattr(loop, "step_losses", spoiled)
    with pytest.raises(UserError, match="step 4"):
        train(config)
    assert all(map(torch.equal, seen["before"], seen["run"].controlnet.parameters()))
    monkeypatch.undo()
    folder = train(config)  # resumes from the last checkpoint
    assert ControlNetModel.from_pretrained(folder) and (folder / "checkpoint-4").is_dir()


def test_another_learning_rate_acts_when_a_run_is_resumed_with_it(quick, tmp_path):
    train(quick(tmp_path / "out", max_train_steps=2, learning_rate=1e-3))
    train(quick(tmp_path / "out", max_train_steps=4, learning_rate=1e-5, adam_weight_decay=0.5, allow_changes=True))
    rates = [entry["learning_rate"] for entry in read_log(tmp_path / "out" / "log.jsonl")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])
    moments = json.loads(safe_open(tmp_path / "out/checkpoint-4/optimizer.safetensors", "pt").metadata()["json"])
    group = moments["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-5), 0.5)


def test_a_run_that_predicts_v_generates_so(quick, random_base, tmp_path):
    own = DDPMScheduler.from_pretrained(random_base, subfolder="scheduler").config.prediction_type
    other = "epsilon" if own == "v_prediction" else "v_prediction"
    folder = train(quick(tmp_path / "out", max_train_steps=1, prediction_type=other))
    settings = make(SampleConfig, "tiny", pretrained_model_name_or_path=str(random_base),
                    controlnet_model_name_or_path=str(folder))  # fmt: skip
    assert (load_pipeline(settings).base.process.predicts == "v") == (other == "v_prediction")
