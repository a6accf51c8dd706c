"""Promise: diffusers' command line is understood word for word, settings are compared by meaning, work is split."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from segcn.generate.config import GenerateConfig, SampleConfig
from segcn.train.config import OBSOLETE, TrainConfig
from segcn.utils import progress as progress_of_work
from segcn.utils.args import arguments_of, help_text, main_guard, make, parse, stoppable, to_json
from segcn.utils.errors import UserError
from segcn.utils.html import img, render
from segcn.utils.io import same_settings
from segcn.utils.paths import ROOT
from segcn.utils.progress import Progress, never_silent

FLAGS = {field.name: field for field in dataclasses.fields(TrainConfig)}
OLD_COMMAND = (
    "--pretrained_model_name_or_path=./stable-diffusion-v1-5 --output_dir=OUT "
    "--dataset_name=./path/containing/metadata.csv --resolution=512 --learning_rate=5e-6 --checkpointing_steps=10000 "
    "--max_train_steps=120000 --train_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing "
    "--use_8bit_adam"
)
# The flags of diffusers' examples/controlnet/train_controlnet.py: type and default, "list" for several words
OLD_FLAGS = {
    str: """pretrained_model_name_or_path controlnet_model_name_or_path revision variant tokenizer_name
    output_dir=controlnet-model cache_dir resume_from_checkpoint lr_scheduler=constant hub_token hub_model_id
    logging_dir=logs report_to=tensorboard mixed_precision dataset_name dataset_config_name train_data_dir
    image_column=image conditioning_image_column=conditioning_image caption_column=text
    tracker_project_name=train_controlnet image_interpolation_mode=bilinear""",
    int: """seed resolution=512 train_batch_size=4 num_train_epochs=1 max_train_steps checkpointing_steps=500
    checkpoints_total_limit gradient_accumulation_steps=1 lr_warmup_steps=500 lr_num_cycles=1 dataloader_num_workers=0
    max_train_samples num_validation_images=4 validation_steps=100""",
    float: """learning_rate=5e-6 lr_power=1.0 adam_beta1=0.9 adam_beta2=0.999 adam_weight_decay=1e-2 adam_epsilon=1e-8
    max_grad_norm=1.0 proportion_empty_prompts=0""",
    bool: """gradient_checkpointing scale_lr use_8bit_adam push_to_hub allow_tf32 set_grads_to_none
    enable_xformers_memory_efficient_attention""",
    list: "validation_prompt validation_image",
}
# Here they mean the embedded base, a folder of our own, and exact repeats.
OTHER_DEFAULTS = {"pretrained_model_name_or_path", "output_dir", "resume_from_checkpoint", "seed"}


def old_flags():
    """Name, type and default of each flag of the old script."""
    for kind, flags in OLD_FLAGS.items():
        for flag in flags.split():
            name, _, default = flag.partition("=")
            yield name, kind, kind(default) if default else (False if kind is bool else None)


def test_the_old_command_is_parsed_word_for_word():
    config = parse(TrainConfig, OLD_COMMAND.split(), "train")
    assert config.pretrained_model_name_or_path == "./stable-diffusion-v1-5"
    assert config.dataset_name == "./path/containing/metadata.csv"
    assert (config.resolution, config.learning_rate, config.checkpointing_steps) == (512, 5e-6, 10000)
    assert (config.max_train_steps, config.train_batch_size, config.gradient_accumulation_steps) == (120000, 1, 1)
    assert config.gradient_checkpointing and config.use_8bit_adam


def test_every_flag_of_the_old_script_has_its_type_and_its_default_or_says_what_differs():
    values = {str: "fp16", int: 7, float: 0.5, bool: True, list: ["a", "b"]}
    for name, kind, default in old_flags():
        if name not in OTHER_DEFAULTS:
            assert FLAGS[name].default == default, name
        if name not in ("report_to", "hub_token"):  # a choice of trackers; kept out of the config
            words = {bool: [], list: ["a", "b"]}.get(kind, [str(values[kind])])
            assert getattr(parse(TrainConfig, [f"--{name}", *words], "train"), name) == values[kind], name
    assert set(OBSOLETE) <= {name for name, _, _ in old_flags()}
    said = {name: FLAGS[name].metadata["help"] for name in OTHER_DEFAULTS | {"cache_dir"}}
    alike = {"pretrained_model_name_or_path", "output_dir"}  # only where: shown as their defaults
    assert {name for name, text in said.items() if "diffusers' script" not in text} == alike


def test_help_is_short_and_shows_every_flag_and_default_once_in_the_sections_of_the_source(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = help_text(TrainConfig, "segcn train")
    assert max(map(len, text.splitlines())) <= 100
    shown = re.findall(r"^  --(\w+)(?:, --no_\w+)?", text, re.MULTILINE)
    assert shown == list(FLAGS) and "  --fused_adam, --no_fused_adam " in text
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith((" ", "fields"))]
    assert titles == list(TrainConfig.SECTIONS.values())
    assert "None" not in text and "[GRADIENT" not in text and text.count("default: fail") == 1
    assert "default: --fused_adam" in " ".join(text.split()) and str(ROOT) not in text.split("Slurm")[0]
    assert all(0 < len(field.metadata["help"]) <= 140 for field in FLAGS.values())
    cluster = ROOT / "segcn" / "train" / "cluster"
    assert cluster.is_dir() and str(cluster) in text
    source = (ROOT / "segcn" / "train" / "config.py").read_text()
    for first, title in list(TrainConfig.SECTIONS.items())[1:]:
        comment = source.index(f"# {title}")
        assert source.index(f"    {first}: ", comment) < source.index("\n", comment) + 6


def test_a_token_is_never_in_a_config(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("os.environ", os.environ.copy())
    config = parse(TrainConfig, ["--hub_token", "hf_secret"], "train")
    assert config.hub_token is None and os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in " ".join(arguments_of(config)) + to_json(config)


def test_what_is_given_precedes_a_preset_and_unknown_names_are_refused():
    config = parse(TrainConfig, ["--preset", "tiny", "--max_train_steps", "7"], "train")
    assert (config.resolution, config.max_train_steps) == (128, 7)
    assert make(SampleConfig, "sd15").guidance_scale == 7.5
    assert make(GenerateConfig, "tiny", seed=3, prompt=None).seed == 3
    with pytest.raises(UserError, match="lerning_rate"):
        make(TrainConfig, "tiny", lerning_rate=1)
    with pytest.raises(UserError, match="huge"):
        make(TrainConfig, "huge")


def test_a_config_becomes_the_command_line_that_gives_it_again():
    lists = {"validation_image": ["a b.png", "c.png"], "validation_prompt": ["x, y", "z"]}
    config = make(TrainConfig, "tiny", **lists, use_8bit_adam=True)
    again = parse(TrainConfig, arguments_of(config), "train")
    assert again == config and (again.validation_image, again.validation_prompt) == tuple(lists.values())


def test_a_file_that_fails_is_one_line_that_names_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        main_guard(Path("/nowhere/a.png").read_bytes)
    assert stopped.value.code == 2 and capsys.readouterr().err == "Error: /nowhere/a.png: No such file or directory\n"


def test_a_stopped_command_says_what_is_kept_and_ignored_signals_and_handlers_stay():
    handlers = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        for number in handlers:
            with pytest.raises(SystemExit, match="kept"), stoppable("Stopped: all is kept."):
                signal.raise_signal(number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stoppable("Stopped."):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_settings_are_recorded_compared_by_meaning_and_changed_on_request_alone(tmp_path):
    path, said = tmp_path / "run" / "settings.json", []
    assert same_settings(path, {"sides": (1, 2), "seed": 0, "steps": 5}) == []
    written = path.read_bytes()
    assert same_settings(path, {"steps": 9, "sides": [1, 2], "seed": 0}, free={"steps"}, write=False) == []
    assert path.read_bytes() == written
    other = r"holds a study with other settings:\n  seed: was 0, is 1\n  rate: was None, is 3"
    with pytest.raises(UserError, match=other):
        same_settings(path, {"seed": 1, "rate": 3}, what="study")
    assert path.read_bytes() == written
    assert same_settings(path, {"seed": 1}, allow=True, log=said.append) == ["seed: was 0, is 1"]
    assert json.loads(path.read_text()) == {"seed": 1} and said == ["Changed: seed: was 0, is 1"]
    path.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        same_settings(path, {"seed": 1})


def test_a_page_escapes_texts_and_holds_its_images():
    text = render("utils/templates/page.html", title="<b>a & b</b>")
    assert "<h1>&lt;b&gt;a &amp; b&lt;/b&gt;</h1>" in text and text.startswith("<!doctype html>")
    assert img(np.zeros((2, 2, 3), np.uint8), "a < b").startswith('<img alt="a &lt; b" src="data:image/png;base64,')


def test_progress_is_a_bar_in_a_terminal_and_a_line_now_and_then_in_a_log(monkeypatch, capsys):
    lines, clock = [], iter([0.0, 4.0, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress("rows encoded", 4, lines.append)
    for done in (1, 2, 3):
        progress(done)
    assert lines == ["  rows encoded 2 of 4, 5.5 s each, 11 s left"]
    monkeypatch.undo()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("rows encoded", 2)
    progress.bar.delay = 0
    progress(1)
    assert "rows encoded" in progress.bar.desc and progress.bar.n == 1
    progress(2)
    assert progress.bar.disable and "per second" not in capsys.readouterr().out


def test_a_command_is_never_silent_for_long_and_its_output_is_left_alone(monkeypatch, capsys):
    streams = sys.stdout, sys.stderr
    with never_silent(after=0.2):
        for _ in range(6):
            time.sleep(0.1)
            print("result")
        progress = Progress("files read", 9, lambda line: None)
        progress(4)
        time.sleep(0.6)
    out, said = capsys.readouterr()
    assert (sys.stdout, sys.stderr) == streams and out == "result\n" * 6
    assert said and all(line.startswith("  files read 4 of 9, still working after ") for line in said.splitlines())
    monkeypatch.setattr(progress_of_work, "WAITING", threading.Event())
    progress_of_work.WAITING.set()  # for a person
    with never_silent(after=0.05):
        time.sleep(0.2)
    progress_of_work.WAITING.clear()
    monkeypatch.setenv("RANK", "1")
    with never_silent(after=0.05):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("cells", "preset", "resolution"), [(16, "tiny", 128), (64, "sd15", 512), (None, "sd15", 512)])
def test_without_a_preset_the_one_that_fits_the_base_is_taken(tmp_path, cells, preset, resolution):
    (tmp_path / "unet").mkdir()
    if cells:
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"sample_size": cells}))
    words = ["--pretrained_model_name_or_path", str(tmp_path), "--dataset_name", "data"]
    config = parse(TrainConfig, words, "segcn train")
    assert (config.preset, config.resolution) == (preset, resolution)
    assert parse(TrainConfig, [*words, "--preset=tiny"], "segcn train").preset == "tiny"
    assert parse(GenerateConfig, words[:2], "segcn generate").preset == preset


@pytest.mark.parametrize(("given", "found"), [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
                                              ({"GOMP_SPINCOUNT": "7"}, "7")])  # fmt: skip
def test_waiting_threads_give_their_core_back_unless_the_user_says_otherwise(given, found):
    program = "import os, segcn; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))} | given
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == found
