"""Promise: a base learns a domain from images alone; it opens in plain diffusers; a killed run ends the same."""

import fnmatch
import json
import re
import shutil
import signal
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from kills import ended, train_as_torchrun
from PIL import Image
from runs import log_of, tree, weights
from safetensors import safe_open
from safetensors.torch import load_file

from segcn.data.metadata import read_split
from segcn.data.unlabelled import check_images, unlabelled_split
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import diffusers_pipeline, load_pipeline
from segcn.models.base import base_fingerprint, encode_text, load_base
from segcn.models.lora import TEXT_TARGETS, add_lora, has_lora, restore_lora
from segcn.train.config import AdaptConfig
from segcn.train.loop import train
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE

LORA = "pytorch_lora_weights.safetensors"
SMALL = {"lora_rank": 2, "lora_targets": ["to_q", "to_v", "conv1", "proj_in"], "learning_rate": 0.01}


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A folder of eight grey scans, one with a caption."""
    folder = tmp_path_factory.mktemp("scans")
    for k in range(8):
        pixels = np.random.default_rng(k).integers(0, 256, (70, 64)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / "0.txt").write_text("a lake")
    return folder


@pytest.fixture(scope="module")
def adapt(quick, grey):
    """A function from settings to the config of six quick steps of adaptation."""
    shared = {name: getattr(quick("x"), name) for name in ("pretrained_model_name_or_path", "cache_dir")}
    shared |= {"resolution": 64, "train_batch_size": 2, "checkpointing_steps": 3, "logging_steps": 1}
    shared |= {"dataset_name": str(grey), "max_train_steps": 6, "lr_scheduler": "constant", **SMALL}
    return lambda out, **settings: make(AdaptConfig, "tiny", **shared | {"output_dir": str(out)} | settings)


@pytest.fixture(scope="module")
def lora(adapt, tmp_path_factory):
    """The folder of an adaptation of six steps without a break, with images while it was trained."""
    shown = {"validation_prompt": ["a lake"], "validation_steps": 6, "use_ema": True}
    return train(adapt(tmp_path_factory.mktemp("adapted") / "lora", **shown))


def drawn(base, prompt="a lake"):
    """An image of a base without a mask, float [H, W, 3] in 0 to 1, by diffusers' own loop."""
    pipe = base if isinstance(base, StableDiffusionPipeline) else diffusers_pipeline(base, SampleConfig())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    shown = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    return pipe(prompt, generator=noise, **shown).images[0]


def plain(folder):
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def test_a_lora_opens_in_plain_diffusers_with_the_same_image_as_here(lora, random_base):
    assert [entry["step"] for entry in log_of(lora)] == [1, 2, 3, 4, 5, 6]
    assert Image.open(lora / "validation" / "step-000006.png").size == (64, 64)
    pipe = plain(random_base)
    before = drawn(pipe)
    pipe.load_lora_weights(lora)
    there, here = drawn(pipe), drawn(load_base(random_base, lora=str(lora)))
    assert np.abs(there - here).max() < 1e-4 < np.abs(there - before).max() / 10
    with safe_open(lora / LORA, "pt") as file:
        recorded = json.loads(file.metadata()["lora_adapter_metadata"])
    assert recorded["unet.r"] == recorded["unet.lora_alpha"] == 2
    loras = [base_fingerprint(random_base, name and str(lora / name)) for name in (None, ".", "checkpoint-3/lora")]
    assert len(set(loras)) == 3 and loras[0] == base_fingerprint(random_base)


def test_a_merged_base_is_the_base_with_its_lora(adapt, lora, random_base, tmp_path):
    merged = train(adapt(tmp_path / "merged", use_ema=True, merge=True))
    assert (merged / "lora" / LORA).read_bytes() == (lora / LORA).read_bytes()
    there = drawn(plain(merged))
    assert np.abs(there - drawn(load_base(random_base, lora=str(lora)))).max() < 1e-4
    assert np.abs(there - drawn(load_base(merged))).max() < 1e-4
    texts = [path.read_text() for path in merged.rglob("*.json") if "checkpoint" not in str(path)]
    assert not any(str(tmp_path) in text for text in texts if "output_dir" not in text)


@pytest.mark.parametrize("settings", [{}, {"unlock": "all"}, {"train_unet": "lora"}, {"train_unet": "decoder"}])
def test_the_code_on_the_card_generates(adapt, quick, random_base, landscapes, tmp_path, monkeypatch, settings):
    made = quick if "train_unet" in settings else adapt
    folder = train(made(tmp_path / "out", max_train_steps=1, hub_model_id="someone/hearts", **settings))
    text = (folder / "README.md").read_text()
    assert ("- lora" in text) == (made is adapt and not settings) and str(tmp_path) not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "hearts").symlink_to(folder)
    (tmp_path / "base").symlink_to(random_base)
    Image.open(read_split(landscapes, "test")[0].mask).convert("RGB").save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.replace('pipe("', 'pipe(num_inference_steps=1, height=64, width=64, prompt="'), found)
    assert found["image"].size == (64, 64)


KINDS = {
    "lora": {"gradient_accumulation_steps": 2, "use_ema": True, "lora_text_encoder": True, "logging_steps": 4},
    "decoder": {"unlock": "decoder"},
    "vae": {"vae_decoder": True, "use_ema": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adaptation_that_is_killed_ends_with_the_same_bytes(adapt, warm, tmp_path, kind):
    straight, cut = (adapt(tmp_path / name, **KINDS[kind]) for name in ("straight", "cut"))
    train(straight)
    assert ended(warm, cut, 2, 6) == -signal.SIGKILL  # amid the second of its two saves
    assert (tmp_path / "cut" / "checkpoint-3").exists() and not (tmp_path / "cut" / "checkpoint-6").exists()
    train(cut)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "straight")
    for name in ("checkpoint-6", "unet", "vae", "text_encoder"):
        assert tree(tmp_path / "cut" / name) == tree(tmp_path / "straight" / name)
    finished = [path.name for path in (tmp_path / "cut").glob("*.safetensors")]
    assert finished == ([LORA] if kind == "lora" else [])
    assert all((tmp_path / "cut" / n).read_bytes() == (tmp_path / "straight" / n).read_bytes() for n in finished)


def test_a_preflight_of_an_adaptation_measures_it(adapt, tmp_path, capsys):
    assert train(adapt(tmp_path / "out", preflight=True)) is None
    said = capsys.readouterr().out
    assert all(words in said for words in ("frozen U-Net", "trained weights", "peak", "s a step", "Proposed"))
    assert not (tmp_path / "out").exists()


def test_a_text_encoder_that_was_trained_is_the_one_that_is_loaded(adapt, random_base, tmp_path):
    folder = train(adapt(tmp_path / "out", lora_text_encoder=True))
    trained = load_base(random_base)
    for network, targets in ((trained.unet, tuple(SMALL["lora_targets"])), (trained.text_encoder, TEXT_TARGETS)):
        add_lora(network, 2, 2, targets)
    restore_lora(folder / "checkpoint-6" / "lora", {"unet": trained.unet, "text_encoder": trained.text_encoder})
    bases = load_base(random_base), trained, load_base(random_base, lora=str(folder))
    before, learnt, loaded = (encode_text(base, ["a lake"]) for base in bases)
    assert (learnt - loaded).abs().max() < 1e-4 < (learnt - before).abs().max() / 10
    assert not has_lora(bases[2].text_encoder)


def test_an_unlocked_base_changes_only_what_was_unlocked(adapt, random_base, tmp_path):
    folder = train(adapt(tmp_path / "base", unlock="decoder"))
    unets = [UNet2DConditionModel.from_pretrained(place, subfolder="unet") for place in (random_base, folder)]
    before, after = (unet.state_dict() for unet in unets)
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all(name.startswith("up_blocks.") for name in changed)
    assert np.abs(drawn(plain(folder)) - drawn(load_base(folder))).max() < 1e-4


def test_the_decoder_learns_while_latents_stay(adapt, random_base, tmp_path):
    folder = train(adapt(tmp_path / "base", vae_decoder=True, max_train_steps=12))
    losses = [entry["loss"] for entry in log_of(folder)]
    assert losses[-1] < losses[0] and (folder / "validation" / "step-000012.png").is_file()
    before, after = (AutoencoderKL.from_pretrained(place, subfolder="vae").eval() for place in (random_base, folder))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = [vae.encode(images).latent_dist.parameters for vae in (before, after)]
        assert torch.equal(*latents)
        means = latents[0].chunk(2, 1)[0]
        assert not torch.equal(before.decode(means).sample, after.decode(means).sample)


def test_images_are_taken_as_they_are_and_what_would_be_black_is_named(grey, landscapes, tmp_path):
    split = unlabelled_split(grey)
    assert len(split) == 8 and split[0].captions == ("a lake",) and split[1].captions == ("",)
    check_images(split, print)
    labelled = unlabelled_split(landscapes)
    assert len(labelled) == 12 and not any(record.mask_name for record in labelled.records)
    assert labelled[0].caption and unlabelled_split(landscapes / "train").fingerprint == labelled.fingerprint
    (tmp_path / "deep").mkdir()
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep" / "a.png")
    (tmp_path / "deep" / "metadata.csv").write_text("file_name,text\na.png,\n")
    check_images(unlabelled_split(tmp_path / "deep"), print)
    Image.fromarray(deep // 16).save(tmp_path / "deep" / "a.png")
    with pytest.raises(UserError, match=r"a\.png: its largest number is 4095 of 65535"):
        check_images(unlabelled_split(tmp_path / "deep"), print)
    (tmp_path / "deep" / "metadata.csv").write_text("file_name\nb.png\n")
    with pytest.raises(UserError, match=r"metadata\.csv, line 2 .*expected a file, found none at 'b\.png'"):
        unlabelled_split(tmp_path / "deep")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: expected images .* found none"):
        unlabelled_split(tmp_path / "none")


WRONG = [
    ({"lora_targets": ["to_x"]}, "--lora_targets: expected ends of .* found 'to_x'"),
    ({"merge": True, "unlock": "all"}, "--merge: expected a LoRA"),
    ({"vae_decoder": True, "unlock": "all"}, "--vae_decoder: is trained by itself"),
    ({"dataset_name": "nowhere"}, "nowhere: no such folder"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_what_cannot_be_adapted_is_named(adapt, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        train(adapt(tmp_path / "out", **wrong))


def test_a_lora_that_is_none_or_another_bases_is_named(random_base, lora, tmp_path):
    for name, message in ((tmp_path / "x", "no such folder"), (tmp_path, f"no {LORA} in it")):
        with pytest.raises(UserError, match=f"--lora .*{message}"):
            load_base(random_base, lora=str(name))
    with pytest.raises(UserError, match=r"--lora .*: expected a LoRA for this base"):
        load_base(BASE, lora=str(lora))


UNET = {"lora": SMALL, "decoder": {}}


@pytest.mark.parametrize("kind", UNET)
def test_a_controlnet_trained_with_its_unet_resumes_and_generates_with_it(
    quick, landscapes, tmp_path, monkeypatch, capsys, kind
):
    settings = {"train_unet": kind, "use_ema": True, **UNET[kind]}
    whole = train(quick(tmp_path / "whole", **settings))
    said = capsys.readouterr().out
    train(quick(tmp_path / "cut", **settings, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **settings))
    assert log_of(cut) == log_of(whole) and weights(cut) == weights(whole)
    for part in ("checkpoint-6", "lora", "base/unet"):
        assert tree(cut / part) == tree(whole / part)
    assert bool(tree(whole / "lora")) == (kind == "lora") and bool(tree(whole / "base")) == (kind == "decoder")
    base = {"pretrained_model_name_or_path": quick("x").pretrained_model_name_or_path}
    own = {"lora": str(whole / "lora")} if kind == "lora" else {"pretrained_model_name_or_path": str(whole / "base")}
    flag, place = next(iter(own.items()))
    assert f"segcn generate --controlnet_model_name_or_path {whole} --{flag} {place}" in said
    palette = read_split(landscapes, "test").palette
    monkeypatch.setattr("segcn.generate.pipeline.OUTPUTS", tmp_path)
    shutil.rmtree(cut)
    assert load_pipeline(make(SampleConfig, "tiny", **base | own), palette).controlnet_folder == str(whole)
    with pytest.raises(UserError, match=f"trained together with its U-Net: add --{flag} {place}"):
        load_pipeline(make(SampleConfig, "tiny", **base, controlnet_model_name_or_path=str(whole)), palette)
    with pytest.raises(UserError, match="no ControlNet"):  # it is not taken for one of the base alone
        load_pipeline(make(SampleConfig, "tiny", **base), palette)


@pytest.mark.parametrize("unet", ["lora", pytest.param(None, marks=pytest.mark.slow, id="adapt")])
def test_two_processes_train_the_base_as_one(quick, adapt, warm, tmp_path, unet):
    smooth = {"adam_epsilon": 1e-2, "lora_rank": 2} | ({"train_unet": unet} if unet else {})
    made = quick if unet else adapt
    one = train(made(tmp_path / "one", train_batch_size=4, **smooth))
    train_as_torchrun(warm, made(tmp_path / "two", train_batch_size=2, **smooth))
    for left, right in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)
    controlnet = "controlnet/diffusion_pytorch_model.safetensors"
    for part in ["lora/" + LORA, *([controlnet] if unet else [])]:
        folders = one / "checkpoint-3", one / "checkpoint-6", tmp_path / "two" / "checkpoint-6"
        start, *ends = (load_file(folder / part) for folder in folders)
        moved = max((start[key] - ends[0][key]).abs().max() for key in start)
        apart = max((ends[0][key] - ends[1][key]).abs().max() for key in start)
        assert moved > 0 and apart < moved / 1000, f"{part}: {apart} apart, {moved} moved in three steps"


@pytest.mark.parametrize("settings", [{}, {"unlock": "decoder"}, {"train_unet": "lora"}])
def test_what_was_trained_is_uploaded_and_nothing_else(adapt, quick, tmp_path, monkeypatch, settings):
    hub = Mock()
    hub.return_value.create_repo.return_value.repo_id = "someone/hearts"
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    made = quick if "train_unet" in settings else adapt
    folder = train(made(tmp_path / "out", max_train_steps=1, push_to_hub=True, **settings))
    patterns = hub.return_value.upload_folder.call_args.kwargs["allow_patterns"]
    taken = {name for name in tree(folder) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)} - {
        "README.md"
    }
    if settings:
        assert {path.split("/")[0] for path in taken} == (
            {"config.json", "diffusion_pytorch_model.safetensors", "palette.json", "lora"}
            if made is quick
            else {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
        )
    else:
        assert taken == {LORA}
