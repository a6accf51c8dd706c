"""Step 2 of the embedded base: CLIP's tokenizer with a vocabulary of a few hundred tokens instead of 49,408.

Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): any text can be written, words that the captions
use are one token each.
"""

import json

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

WORD_END = "</w>"
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
OTHER_WORDS = (
    "a an the of with and in on at by to from over under near behind beside between photo picture painting image "
    "aerial satellite topographic shaded relief map tile earth ocean sea coast island desert sand forest jungle "
    "savanna shrub grassland cropland field wetland tundra ice glacier urban city barren land soil rock hill valley "
    "bridge boat person car animal flower red orange yellow green blue purple pink brown black white grey dark bright "
    "no none one two three"
)


def build_tokenizer(captions: list[str], length: int = 48) -> CLIPTokenizer:
    """Learn merges from captions and a list of common words; texts are padded and cut to `length` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False)
    learner.train_from_iterator([*captions, *OTHER_WORDS.split() * 3], trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(pair) for pair in merges), *SPECIAL]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _merges(tokenizer: Tokenizer) -> list:
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
