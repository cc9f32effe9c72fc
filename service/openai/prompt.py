"""Reads labels from a prompt such as "a red cube and a blue sphere". Knows no HTTP."""

import re
from itertools import dropwhile, groupby
from typing import Final

from shared.vocabulary import LabelError, Vocabulary

SEPARATORS: Final = frozenset({",", ";", "&", "+", "and", "with", "plus"})
ARTICLES: Final = frozenset({"a", "an", "the", "one"})
NUMBERS: Final = frozenset({"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "many"})
WORD: Final = re.compile(r"[,;&+]|[^\s,;&+]+")


def _normal(text: str) -> str:
    """Return a text's words and separators in lower case, without surrounding full stops and quotes."""
    words = (word.strip(".!?\"'()").casefold() for word in WORD.findall(text))
    return " ".join(word for word in words if word)


def parse_prompt(prompt: str, vocabulary: Vocabulary) -> list[str]:
    """Return the labels that a prompt names, in its order.

    At each word the longest matching name wins, so that names may contain separators. Raises LabelError for a word that
    belongs to no label, and for too many labels or none.
    """
    names = {_normal(name): name for name in reversed(vocabulary.names)}
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    parts = re.split(rf"(?<!\S)({longest_first})(?!\S)", _normal(prompt))  # every second one is a name
    for between in parts[::2]:
        for separates, words in groupby(between.split(), SEPARATORS.__contains__):
            unknown = " ".join(dropwhile(ARTICLES.__contains__, words))
            if unknown and not separates:
                _refuse(unknown, vocabulary)
    if len(parts) == 1:
        raise LabelError(f"the prompt names no label; wanted at least one, such as {vocabulary.names[0]!r}")
    return vocabulary.check_entry([names[name] for name in parts[1::2]])


def _refuse(unknown: str, vocabulary: Vocabulary) -> None:
    """Raise the LabelError for words that are no label."""
    first, _, rest = unknown.partition(" ")
    if rest and (first in NUMBERS or first.isdecimal()):
        label = vocabulary.nearest(rest) or "it"
        raise LabelError(
            f'"{unknown}": a picture shows an object of each kind at most once; ask for "{label}", '
            "and for more pictures with n"
        )
    vocabulary.index(unknown)  # raises LabelError, with the nearest name
