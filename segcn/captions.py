"""Captions: count their words, tell them otherwise, and mirror them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

WORDS = (("spring", "summer", "autumn", "winter"), ("dawn", "by day", "dusk", "night"))
AT = {"dawn": "at dawn", "by day": "by day", "dusk": "at dusk", "night": "at night"}
SIDE = re.compile(r"(?<![^\W\d_])(?:top|bottom|upper|lower)?(?:left|right)", re.IGNORECASE)
MIRRORED = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
MIRRORED |= {new: old for old, new in MIRRORED.items()}
MIRRORED_WORD = re.compile(
    r"(?<![^\W\d_])((?i:top|bottom|upper|lower)?)(left|right|Left|Right|LEFT|RIGHT)"
    r"((?i:most|wards?|hand|handed|side)?)(?![^\W\d_])"
)
DULL = {"a", "an", "and", "at", "by", "in", "of", "on", "the", "to", "with"}


def common_words(captions: Iterable[str], count: int = 20) -> list[tuple[str, int]]:
    """The words in most captions, each with the number of captions that hold it; articles and the like left out."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(set(re.findall(r"[^\W\d_]+", caption.lower())) - DULL)
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:count]


def retold(caption: str, season_turn: int = 2, time_turn: int = 2) -> str:
    """The caption with its season and time of day some places further round; unchanged where it names neither."""
    season = re.compile(r"\b(an? )?(spring|summer|autumn|winter)\b")
    caption = season.sub(lambda found: _season(found[1], found[2], season_turn), caption)
    time = re.compile(r"\b(?:at (dawn|dusk|night)|(by day))\b")
    return time.sub(lambda found: AT[_turned(WORDS[1], found[1] or found[2], time_turn)], caption)


def other_captions(captions: Sequence[str]) -> list[str]:
    """A different caption for each row: retold, or the next row's where it names no season or time."""
    told = [retold(caption) for caption in captions]
    return [new if new != old else captions[(row + 1) % len(captions)]
            for row, (old, new) in enumerate(zip(captions, told, strict=True))]  # fmt: skip


def variations(caption: str, others: Sequence[str], count: int = 4) -> list[str]:
    """The caption and `count` - 1 different ones: each season at another time of day, or else captions of `others`."""
    told = [retold(caption, turn, turn) for turn in range(count)]
    return list(dict.fromkeys([*told, *others]))[:count]


def says_a_side(caption: str) -> bool:
    """Whether a word starts with left or right: also leftovers, to be on the safe side."""
    return SIDE.search(caption) is not None


def mirrored(caption: str) -> str:
    """The caption of the mirrored picture: left and right exchanged, also in leftmost, left-hand or Upper-Left.

    Mirrored twice it is the same again. Meanings are not known: "right behind" becomes "left behind".
    """
    return MIRRORED_WORD.sub(lambda found: found[1] + MIRRORED[found[2]] + found[3], caption)


def cannot_be_mirrored(caption: str) -> bool:
    """Whether a word that may say a side is none of those that `mirrored` knows."""
    return says_a_side(MIRRORED_WORD.sub("", caption))


def _season(article: str | None, season: str, turn: int) -> str:
    new = _turned(WORDS[0], season, turn)
    return f"{'an' if new[0] in 'aeiou' else 'a'} {new}" if article else new


def _turned(words: Sequence[str], word: str, turn: int) -> str:
    return words[(words.index(word) + turn) % len(words)]
