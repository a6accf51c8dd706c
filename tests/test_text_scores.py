"""Promise: CLIPScore is that of the paper, by any CLIP folder, and sample captions are read off the images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from segcn.data.dataset import to_image
from segcn.data.metadata import read_split
from segcn.models.features import clip_reader
from segcn.samples import recognizer
from segcn.samples.recognizer import RecognizerRecipe, caption_reader, recognized, train_recognizer
from segcn.utils.errors import UserError


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


def test_what_is_no_clip_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--clip .*expected a folder of CLIPModel"):
        clip_reader(tmp_path)


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
    assert (
        caption_reader(tmp_path, train, tmp_path) is None and caption_reader(tmp_path / "no", train, tmp_path) is None
    )
