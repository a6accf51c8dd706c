"""What is done to captions: count their words, list classes in them, change what they say, and mirror them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from segcn.data.masks import count_ids
from segcn.data.palette import IGNORE, Palette
from segcn.utils import rng

SEASONS = ("spring", "summer", "autumn", "winter")
TIMES = {"dawn": "at dawn", "day": "by day", "dusk": "at dusk", "night": "at night"}
SEASON = re.compile(rf"\b(an? )?({'|'.join(SEASONS)})\b")
TIME = re.compile(rf"\b(?:{'|'.join(TIMES.values())})\b")
SIDE = re.compile(r"(?<![^\W\d_])(?:top|bottom|upper|lower)?(?:left|right)", re.IGNORECASE)
MIRRORED = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
MIRRORED |= {new: old for old, new in MIRRORED.items()}
MIRRORED_WORD = re.compile(
    r"(?<![^\W\d_])((?i:top|bottom|upper|lower)?)(left|right|Left|Right|LEFT|RIGHT)"
    r"((?i:most|wards?|hand|handed|side)?)(?![^\W\d_])"
)
LETTER = re.compile(r"(?:^|(?<=[ _.-]))[LRlr](?=$|[ _.-])")  # L_lung, kidney-r
OTHER_LETTER = str.maketrans("LRlr", "RLrl")
PHRASES = re.compile(r"(\s*[,;]\s*(?:and\s+)?|\s+(?:and|with|of|showing|containing)\s+)", re.IGNORECASE)  # between them
CLASSES = "{classes}"  # in a prompt: becomes the classes of the mask
FUNCTION_WORDS = {"a", "an", "and", "at", "by", "in", "of", "on", "the", "to", "with"}


def common_words(captions: Iterable[str], count: int = 20) -> list[tuple[str, int]]:
    """The words in most captions, each with the number of captions that hold it; articles and the like left out."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(set(re.findall(r"[^\W\d_]+", caption.lower())) - FUNCTION_WORDS)
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:count]


def substituted(caption: str, turn: int = 2) -> str:
    """The caption with its season and time of day `turn` places further round; unchanged where it names neither."""
    times = list(TIMES.values())

    def other_season(found: re.Match) -> str:
        season = SEASONS[(SEASONS.index(found[2]) + turn) % len(SEASONS)]
        return f"{article_of(season)} {season}" if found[1] else season

    return TIME.sub(lambda found: times[(times.index(found[0]) + turn) % len(times)], SEASON.sub(other_season, caption))


def other_captions(captions: Sequence[str]) -> list[str]:
    """A different caption for each row: another season and time, or the next row's where it names neither."""
    after = [*captions[1:], *captions[:1]]
    return [new if (new := substituted(old)) != old else following
            for old, following in zip(captions, after, strict=True)]  # fmt: skip


def variations(caption: str, others: Sequence[str], count: int = 4) -> list[str]:
    """The caption and `count` - 1 different ones: each season at another time of day, or else captions of `others`."""
    return list(dict.fromkeys([*(substituted(caption, turn) for turn in range(count)), *others]))[:count]


def listed(names: Sequence[str]) -> str:
    """Names as a caption lists them: "sky, grass and tree"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def classes_of(mask: np.ndarray, palette: Palette) -> str:
    """The names of the classes in a mask, uint8 [H, W], the largest first: "sky, grass and tree"."""
    pixels, names = count_ids(mask), {label.id: label.name for label in palette.labels}
    found = [names[id] for id in np.argsort(-pixels, kind="stable").tolist() if pixels[id] and id != IGNORE]
    return listed(found or ["nothing labelled"])


def without_classes(caption: str, palette: Palette, one: int | None = None) -> str:
    """The caption without the phrases that name a class of the palette: its name or one of its `words`, or the plural.

    "a winter landscape at dusk with mountains, a lake and a red house" becomes "a winter landscape at dusk": it
    says how the image looks, and leaves to the mask what is where. one: cuts a single phrase, the one of this number,
    counted round: with 1 the lake is no longer named, and mountains and house are.
    """
    labels = [label for label in palette.labels if not label.ignore]
    pattern = _finder(tuple(word for label in labels for word in (label.name, *label.words)))
    parts = PHRASES.split(caption.strip())  # phrase, connector, phrase, ...
    phrases = range(0, len(parts), 2)
    cut = [number for number in phrases if pattern.search(parts[number])]
    if not cut:
        return caption
    cut = cut if one is None else [cut[one % len(cut)]]
    kept = [number for number in phrases if number not in cut]
    text = parts[kept[0]] if kept else ""
    for before, number in pairwise(kept):
        first, last = parts[before + 1], parts[number - 1]  # the connectors on both sides of what was cut out
        comma = first.strip() in ",;" or (first.strip().lower() == "of" and last.strip() in ",;")
        text += (last if comma or number - before == 2 else first) + parts[number]
    return text


def classes_named(caption: str, palette: Palette) -> set[int]:
    """The ids of the classes that a caption names: by name, one of their `words`, or the plural."""
    labels = [label for label in palette.labels if not label.ignore]
    return {label.id for label in labels if _finder((label.name, *label.words)).search(caption)}


def cut_captions(caption: str, palette: Palette) -> list[str]:
    """What --caption_class_dropout makes of a caption: without its classes, and twice without one of them.

    Which one is left out differs between captions: so, over a data set, each class is sometimes in the mask alone.
    """
    one = rng.integer(2**16, "cut", caption)
    return [without_classes(caption, palette, which) for which in (None, one, one + 1)]


@lru_cache(512)
def _finder(names: tuple[str, ...]) -> re.Pattern:
    words = [re.escape(re.sub(r"[\W_]+", " ", name).strip()).replace(r"\ ", r"[\W_]+") for name in names]
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(filter(None, words)) or '(?!)'})(?:e?s)?(?![^\W_])", re.IGNORECASE)


def article_of(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


def says_a_side(caption: str) -> bool:
    """Whether a word starts with left or right: also leftovers, to be on the safe side."""
    return SIDE.search(caption) is not None


def mirrored(caption: str) -> str:
    """The caption of the mirrored image: left and right exchanged, also in leftmost, left-hand or Upper-Left.

    Mirrored twice it is the same again. Meanings are not known: "right behind" becomes "left behind".
    """
    return MIRRORED_WORD.sub(lambda found: found[1] + MIRRORED[found[2]] + found[3], caption)


def mirrored_ids(palette: Palette) -> np.ndarray | None:
    """The id of each class in a mirrored image, uint8 [256]: left and right lung change places; else the same id.

    By the palette's `mirror`, else by the names: left and right, or L and R at an end. None where a class of one side
    has no partner: its images cannot be mirrored.
    """
    table, id_of = np.arange(256, dtype=np.uint8), {label.name: label.id for label in palette.labels}
    partners = {label.mirror: label.id for label in palette.labels if label.mirror is not None}
    for label in palette.labels:
        own = label.mirror if label.mirror is not None else partners.get(label.id)
        name = mirrored(label.name)
        letters = LETTER.sub(lambda found: found[0].translate(OTHER_LETTER), label.name)
        own = id_of.get(name if name != label.name else letters) if own is None else own
        if own is None and name != label.name:
            return None
        table[label.id] = label.id if own is None else own
    return table


def cannot_be_mirrored(caption: str) -> bool:
    """Whether a word that may say a side is none of those that `mirrored` knows."""
    return says_a_side(MIRRORED_WORD.sub("", caption))
