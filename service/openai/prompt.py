"""Reads labels from a prompt such as "a red cube and a blue sphere". Knows no HTTP."""

import re
from typing import Final

from shared.vocabulary import LabelError, Vocabulary

SEPARATORS: Final = frozenset({",", ";", "&", "+", "and", "with", "plus"})
ARTICLES: Final = frozenset({"a", "an", "the", "one"})
NUMBERS: Final = frozenset({"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "many"})
WORD: Final = re.compile(r"[,;&+]|[^\s,;&+]+")


def _words(text: str) -> list[str]:
    """Split a text into words and separators: lower case, without surrounding full stops and quotes."""
    found = (word.strip(".!?\"'()").casefold() for word in WORD.findall(text))
    return [word for word in found if word]


def parse_prompt(prompt: str, vocabulary: Vocabulary) -> list[str]:
    """Return the labels that a prompt names, in its order.

    At each word the longest matching name wins, so that names may contain separators. Raises LabelError for a word that
    belongs to no label, and for too many labels or none.
    """
    words = _words(prompt)
    names = {tuple(_words(name)): name for name in reversed(vocabulary.names)}
    longest = max(map(len, names))
    labels: list[str] = []
    unknown: list[str] = []
    at = 0
    while at < len(words):
        lengths = range(min(longest, len(words) - at), 0, -1)
        length = next((n for n in lengths if tuple(words[at : at + n]) in names), 0)
        if length or words[at] in SEPARATORS:
            if unknown:
                break
            labels += [names[tuple(words[at : at + length])]] if length else []
        elif unknown or words[at] not in ARTICLES:
            unknown.append(words[at])
        at += max(length, 1)
    if len(unknown) > 1 and (unknown[0] in NUMBERS or unknown[0].isdecimal()):
        label = vocabulary.nearest(" ".join(unknown[1:])) or "it"
        raise LabelError(
            f'"{" ".join(unknown)}": a picture shows an object of each kind at most once; ask for "{label}", '
            "and for more pictures with n"
        )
    if unknown:
        vocabulary.index(" ".join(unknown))  # raises LabelError, with the nearest name
    if not labels:
        raise LabelError(f"the prompt names no label; wanted at least one, such as {vocabulary.names[0]!r}")
    return vocabulary.check_entry(labels)
