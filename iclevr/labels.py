"""i-CLEVR's labels. Imports no torch."""

from typing import Final

from shared.vocabulary import Vocabulary

# i-CLEVR's 24 objects in the course's order, as in its objects.json
ICLEVR: Final = Vocabulary(
    tuple(
        f"{color} {shape}"
        for shape in ("cube", "sphere", "cylinder")
        for color in ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
    )
)
