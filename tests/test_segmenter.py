"""Promise: the segmenter is a function of rows, settings and seed, and trained once; CLIPScore is that of the paper."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForSemanticSegmentation,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from segcn.data.dataset import to_image
from segcn.data.masks import write_mask
from segcn.data.metadata import read_split, write_metadata
from segcn.data.palette import IGNORE, Label, Palette
from segcn.data.sampler import class_pixels, class_weights
from segcn.evaluate import run as evaluation
from segcn.evaluate.config import EvaluateConfig
from segcn.generate import filtering
from segcn.generate.conditions import read_conditions
from segcn.generate.config import GenerateConfig
from segcn.models.base import weights_digest
from segcn.models.features import clip_extractor, clip_reader
from segcn.models.segmenter import (
    SegmenterConfig,
    build_segmenter,
    load_segmenter,
    predict,
    segmentation_loss,
    segmenter_of,
    shared_folder,
    train_segmenter,
)
from segcn.samples import recognizer
from segcn.samples.recognizer import RecognizerRecipe, caption_reader, recognized, train_recognizer
from segcn.utils.errors import UserError

SKY, GRASS, ROAD = Label(0, "sky", (90, 160, 220)), Label(1, "grass", (70, 150, 60)), Label(2, "road", (120, 110, 100))
PALETTE = Palette((SKY, GRASS, ROAD))
SHORT = SegmenterConfig(steps=3, batch_size=2, width=8, resolution=32)


def write_rectangles(folder, count, seed=0, side=32):
    """Images of rectangles whose color is their class, with a little noise, and a stripe of unlabelled pixels."""
    noise = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(count):
        mask = np.zeros((side, side), np.uint8)
        for label in noise.permutation([1, 2]):
            top, left = noise.integers(0, side // 2, 2)
            mask[top : top + side // 2, left : left + side // 2] = label
        image = PALETTE.table[mask] + noise.integers(-10, 11, (side, side, 3))
        mask[:2] = IGNORE
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{row}.png")
        write_mask(folder / f"mask-{row}.png", mask, PALETTE)
    PALETTE.save(folder / "palette.json")
    write_metadata(folder, [(f"{row}.png", f"mask-{row}.png", "rectangles") for row in range(count)])
    return read_split(folder)


def quiet(line):
    pass


@pytest.fixture
def split(tmp_path):
    return write_rectangles(tmp_path / "data", 6)


def test_logits_have_the_size_of_any_image_and_predictions_are_class_ids_whatever_the_batch_size():
    segmenter = build_segmenter(5, width=8)
    for size in [(16, 16), (33, 50), (1, 7), (128, 64)]:
        assert segmenter(torch.zeros(2, 3, *size)).shape == (2, 5, *size)
        assert segmenter.features(torch.zeros(2, 3, *size)).shape == (2, 24)
    image = torch.rand(1, 3, 30, 32) * 2 - 1
    filled = torch.cat([image, image[..., -1:, :], image[..., -1:, :]], dim=-2)  # as the network pads to its stride
    assert torch.equal(segmenter(image), segmenter(filled)[..., :30, :])
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    together, apart = predict(segmenter, images), predict(segmenter, images, batch_size=2)
    assert (together.dtype, together.shape) == (torch.uint8, (5, 32, 32)) and together.max() < 5
    assert torch.equal(together, apart)


def test_a_fresh_segmenter_depends_on_its_seed_alone_and_a_trained_one_on_its_arguments(split, tmp_path):
    torch.manual_seed(1)
    first, state = build_segmenter(3, 8, seed=4), torch.get_rng_state()
    torch.manual_seed(2)
    second, other = build_segmenter(3, 8, seed=4), build_segmenter(3, 8, seed=5)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, seed in {"first": 0, "second": 0, "third": 1}.items():
        train_segmenter(split, replace(SHORT, seed=seed), tmp_path / name, quiet)
    one, same, another = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "third"))
    assert one == same != another


def test_unlabelled_pixels_leave_the_loss_and_those_of_an_image_count_by_its_weight():
    logits, ones = torch.randn(2, 3, 4, 4), torch.ones(3)
    mask = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    mask[1, :2] = IGNORE  # 16 pixels of the first image, 8 of the second
    first, second = (segmentation_loss(logits[i : i + 1], mask[i : i + 1], ones) for i in (0, 1))
    assert torch.isclose(second, segmentation_loss(logits[1:, :, 2:], mask[1:, 2:], ones))
    assert segmentation_loss(logits, torch.full_like(mask, IGNORE), ones) == 0
    quarter = segmentation_loss(logits, mask, ones, torch.tensor([1.0, 0.25]))
    assert torch.isclose(quarter, (16 * first + 2 * second) / 18)
    assert torch.isclose(segmentation_loss(logits, mask, ones, torch.tensor([1.0, 0.0])), first)
    assert torch.equal(segmentation_loss(logits, mask, ones), segmentation_loss(logits, mask, ones, torch.ones(2)))


def test_rare_classes_weigh_more_the_average_pixel_one_and_absent_ones_keep_what_is_learned_finite(split, tmp_path):
    weights = class_weights(class_pixels(split))
    masks = np.stack([np.array(Image.open(record.mask)) for record in split.records])
    share = np.array([(masks == label).sum() for label in range(3)]) / (masks != IGNORE).sum()
    assert np.argsort(weights).tolist() == np.argsort(-share).tolist()
    assert float((weights.numpy() * share).sum()) == pytest.approx(1)
    Palette((*PALETTE.labels, Label(7, "house", (1, 2, 3)))).save(split.folder / "palette.json")
    segmenter = train_segmenter(read_split(split.folder), SHORT, tmp_path / "segmenter", quiet)
    assert segmenter.num_classes == 8
    assert all(tensor.isfinite().all() for tensor in segmenter.state_dict().values())


def test_the_segmenter_of_the_same_rows_and_settings_is_trained_once_and_again_where_it_is_damaged(split, tmp_path):
    said = []
    trained = segmenter_of(split, SHORT, tmp_path, said.append)
    assert said[0].startswith("segmenter: 3 steps, loss ") and "stored in" in said[-1]
    again = segmenter_of(split, SHORT, tmp_path, said.append)
    assert sum("3 steps" in line for line in said) == 1 and said[-1].startswith("segmenter: reused")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(trained(images), again(images))
    assert again.settings == trained.settings and again.settings["rows"] == 6
    folder = shared_folder(tmp_path, split, SHORT)
    assert Palette.load(folder / "palette.json") == PALETTE
    other = write_rectangles(tmp_path / "other", 4, seed=1)
    folders = {folder, shared_folder(tmp_path, other, SHORT), shared_folder(tmp_path, split, replace(SHORT, seed=1))}
    assert len(folders) == 3
    assert segmenter_of(other, SHORT, tmp_path, quiet).settings["rows"] == 4
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"model\.safetensors does not match"):
        load_segmenter(folder)
    said.clear()
    segmenter_of(split, SHORT, tmp_path, said.append)
    assert "training it again" in said[0] and load_segmenter(folder).num_classes == 3


def test_settings_that_make_no_sense_are_refused_and_a_folder_of_something_else_is_set_aside(split, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        SegmenterConfig(steps=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    train_segmenter(split, SHORT, tmp_path / "mine", quiet)
    assert [path.read_text() for path in tmp_path.glob("mine.set-aside-*/thesis.txt")] == ["years of work"]


def test_a_network_of_transformers_is_trained_to_the_same_bytes_and_opens_there(split, segformer, tmp_path):
    settings = replace(SHORT, architecture=str(segformer), learning_rate=0)
    assert settings.learning_rate == 3e-4 and "width" not in settings.content
    first, second = (train_segmenter(split, settings, tmp_path / name, quiet, "cpu") for name in "ab")
    assert weights_digest(first) == weights_digest(second)
    other = train_segmenter(split, replace(settings, seed=1), tmp_path / "c", quiet, "cpu")
    assert weights_digest(other) != weights_digest(first)
    image, opened = torch.rand(1, 3, 32, 32) * 2 - 1, load_segmenter(tmp_path / "a", "cpu")
    assert torch.equal(opened(image), first(image)) and opened.settings == first.settings
    assert opened.settings["resolution"] == 32 and opened.settings["name"] == "segformer (segformer)"
    theirs = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(theirs(opened.normalize(image)).logits, opened.model(opened.normalize(image)).logits)
    lowered = opened(image)
    opened.lower(torch.tensor([1.0, 0.0, -2.0]))
    assert torch.allclose(lowered - opened(image), torch.tensor([1.0, 0.0, -2.0])[None, :, None, None], atol=1e-5)
    begun = build_segmenter(3, architecture=str(tmp_path / "a"))  # a folder with weights is where another one starts
    assert weights_digest(begun) == weights_digest(first)
    assert build_segmenter(5, architecture=str(tmp_path / "a"))(image).shape == (1, 5, 32, 32)
    assert shared_folder("", split, settings) != shared_folder("", split, SHORT)
    with pytest.raises(UserError, match="--segmenter_architecture unet: expected small, or a folder"):
        build_segmenter(3, architecture="unet")


def test_filter_and_evaluation_train_the_architecture_that_is_requested(landscapes, segformer, tmp_path, monkeypatch):
    trained = []
    for module in (filtering, evaluation):
        monkeypatch.setattr(module, "segmenter_of", lambda split, settings, *rest: trained.append(settings))
    given = {"segmenter_architecture": str(segformer)}
    config = GenerateConfig(controls=str(landscapes), output_dir=str(tmp_path / "out"), min_miou=0.5, **given)
    filtering.open_filter(config, read_conditions(config), quiet)
    config = EvaluateConfig(real=str(landscapes), synthetic=str(landscapes / "test"), **given)
    evaluation._segmenter(config, evaluation.read_splits(config), tmp_path, quiet)
    assert [settings.architecture for settings in trained] == [str(segformer)] * 2
    assert {settings.resolution for settings in trained} == {64} and trained[0].seed != trained[1].seed


@pytest.fixture(scope="module")
def clip(tmp_path_factory, random_base):
    """A tiny CLIP of random weights with the tokenizer of the test base."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(random_base / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=16,
                          eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def by_hand(folder, pixels, caption):
    """100 x the cosine of CLIP's two projected vectors, at least 0."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    words = tokenizer([caption], return_tensors="pt", truncation=True, max_length=16)
    seen = CLIPImageProcessor.from_pretrained(folder)(Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        out = model(**words, **seen)
    return max(0.0, 100 * float((out.text_embeds * out.image_embeds).sum()))


def test_the_score_is_a_hundred_times_the_cosine_of_clips_vectors_and_names_the_folder(clip):
    reader, noise = clip_reader(clip, "cpu"), np.random.default_rng(0)
    scores = []
    for caption in ("a winter landscape", "a lake at dusk " * 20):
        pixels = noise.integers(0, 256, (40, 40, 3), np.uint8)
        expected = by_hand(clip, pixels, caption)
        scores += reader.read(to_image(torch.from_numpy(pixels).permute(2, 0, 1))[None], caption)
        assert scores[-1] == pytest.approx(expected, abs=1e-3)
    assert reader.names == ("CLIPScore (clip)",) and max(scores) > 0
    image = to_image(torch.from_numpy(pixels).permute(2, 0, 1))[None]
    with torch.no_grad():
        seen = CLIPImageProcessor.from_pretrained(clip)(Image.fromarray(pixels), return_tensors="pt")
        vector = CLIPModel.from_pretrained(clip).get_image_features(**seen)
    assert torch.allclose(
        clip_extractor(clip, "cpu").extract(image), getattr(vector, "pooler_output", vector), atol=1e-5
    )
    with pytest.raises(UserError, match=r"--clip .*expected a folder of CLIPModel"):
        clip_reader(clip / "tokenizer")


def test_captions_of_sample_sets_are_read_off_and_others_are_not(landscapes, tmp_path, monkeypatch):
    train = read_split(landscapes, "train")
    recipe = RecognizerRecipe(steps=2, batch_size=4)
    monkeypatch.setattr(recognizer, "train_recognizer", lambda *given, log: train_recognizer(*given, recipe, log))
    reader = caption_reader(landscapes, train, tmp_path, lambda line: None)
    assert reader.names == ("season recognized", "time of day recognized")
    network = train_recognizer(train, recognizer.OF_LANDSCAPES, tmp_path / "recognizer", recipe, lambda line: None)
    images = [np.array(Image.open(record.image)) for record in train.records]
    scores = [reader.read(to_image(torch.from_numpy(image).permute(2, 0, 1))[None], record.caption)
            for image, record in zip(images, train.records, strict=True)]  # fmt: skip
    assert np.mean(scores, 0).tolist() == pytest.approx(list(recognized(train, network).values()))
    blank = torch.zeros(1, 3, 64, 64)
    assert all(np.isnan(reader.read(blank, "words of my own")))
    (tmp_path / "samples.json").write_text(json.dumps({"kind": "portraits"}))
    assert [caption_reader(folder, train, tmp_path) for folder in (tmp_path, tmp_path / "no")] == [None, None]
