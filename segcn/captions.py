"""Captions: count their words, and tell them otherwise."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

WORDS = (("spring", "summer", "autumn", "winter"), ("dawn", "by day", "dusk", "night"))
AT = {"dawn": "at dawn", "by day": "by day", "dusk": "at dusk", "night": "at night"}
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


def _season(article: str | None, season: str, turn: int) -> str:
    new = _turned(WORDS[0], season, turn)
    return f"{'an' if new[0] in 'aeiou' else 'a'} {new}" if article else new


def _turned(words: Sequence[str], word: str, turn: int) -> str:
    return words[(words.index(word) + turn) % len(words)]
