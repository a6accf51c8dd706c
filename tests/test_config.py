"""Promise: the old script's command line is understood word for word, and a preset stands below what is given."""

import pytest

from segcn.arguments import arguments_of, make, parse
from segcn.config import GenerateConfig, SampleConfig
from segcn.errors import UserError
from segcn.train_config import OBSOLETE, TrainConfig, differences

OLD_COMMAND = (
    "--pretrained_model_name_or_path=./stable-diffusion-v1-5 --output_dir=OUT "
    "--dataset_name=./path/containing/metadata.csv --resolution=512 --learning_rate=5e-6 --checkpointing_steps=10000 "
    "--max_train_steps=120000 --train_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing "
    "--use_8bit_adam"
)
# The flags of diffusers' examples/controlnet/train_controlnet.py
OLD_FLAGS = """pretrained_model_name_or_path controlnet_model_name_or_path revision variant tokenizer_name output_dir
cache_dir seed resolution train_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32
report_to mixed_precision enable_xformers_memory_efficient_attention set_grads_to_none dataset_name
dataset_config_name train_data_dir image_column conditioning_image_column caption_column max_train_samples
proportion_empty_prompts validation_prompt validation_image num_validation_images validation_steps
tracker_project_name image_interpolation_mode""".split()  # noqa: SIM905


def test_the_old_command_is_parsed_word_for_word():
    config = parse(TrainConfig, OLD_COMMAND.split(), "train")
    assert config.pretrained_model_name_or_path == "./stable-diffusion-v1-5"
    assert config.dataset_name == "./path/containing/metadata.csv"
    assert (config.resolution, config.learning_rate, config.checkpointing_steps) == (512, 5e-6, 10000)
    assert (config.max_train_steps, config.train_batch_size, config.gradient_accumulation_steps) == (120000, 1, 1)
    assert config.gradient_checkpointing and config.use_8bit_adam


def test_every_flag_of_the_old_script_is_there():
    known = set(TrainConfig.__dataclass_fields__)
    assert [name for name in OLD_FLAGS if name not in known] == []
    assert set(OBSOLETE) <= set(OLD_FLAGS)


def test_flags_that_take_lists():
    words = ["--validation_image", "a.png", "b.png", "--validation_prompt", "one", "two"]
    config = parse(TrainConfig, words, "train")
    assert config.validation_image == ["a.png", "b.png"] and config.validation_prompt == ["one", "two"]


def test_a_preset_stands_below_what_is_given():
    config = parse(TrainConfig, ["--preset", "tiny", "--max_train_steps", "7"], "train")
    assert (config.resolution, config.max_train_steps) == (128, 7)
    assert make(SampleConfig, "sd15").guidance_scale == 7.5
    assert make(GenerateConfig, "tiny", seed=3, prompt=None).seed == 3


def test_unknown_settings_and_presets_are_refused_by_name():
    with pytest.raises(UserError, match="lerning_rate"):
        make(TrainConfig, "tiny", lerning_rate=1)
    with pytest.raises(UserError, match="huge"):
        make(TrainConfig, "huge")
    with pytest.raises(UserError, match="lerning_rate"):
        parse(TrainConfig, ["--lerning_rate", "1"], "train")


def test_a_config_becomes_the_command_line_that_gives_it_again():
    config = make(TrainConfig, "tiny", validation_image=["a b.png"], validation_prompt=["x, y"], use_8bit_adam=True)
    assert parse(TrainConfig, arguments_of(config), "train") == config


def test_differences_leave_out_what_may_change():
    old = {"learning_rate": 1e-3, "max_train_steps": 5}
    assert differences(old, {"learning_rate": 1e-3, "max_train_steps": 9}) == []
    assert differences(old, {"learning_rate": 1e-4}) == ["learning_rate: was 0.001, is 0.0001"]
