"""Edits a picture before it is sampled: the same noise, with the objects that the network is given changed.

The other objects keep their positions and rotations, so a denoiser that takes positions draws them as before
(docs/results.md has the figures). Nothing is trained for it.
"""

from collections.abc import Sequence

from torch import Tensor

from shared.diffusion.layouts import OUTSIDE, PLACE, ROTATION
from shared.edits import Object
from shared.vocabulary import Vocabulary


def with_objects(labels: Tensor, objects: Sequence[Object], vocabulary: Vocabulary) -> Tensor:
    """Return what a network with positions is given of labels, (K, 3) or more columns, for an edited picture.

    An object that was added has the rotation that the seed drew for its label, and so has one whose new or old label
    has no rotation. LabelError for unknown labels.
    """
    new = labels.clone()
    new[:, 0], new[:, PLACE] = 0, OUTSIDE
    for one in objects:
        k, origin = vocabulary.index(one.label), vocabulary.index(one.origin or one.label)
        new[k] = labels[origin]
        new[k, 0] = 1
        if not labels[[k, origin], ROTATION].any(1).all():
            new[k, ROTATION] = labels[k, ROTATION]
        if one.place is not None:
            new[k, PLACE] = new.new_tensor(one.place)
    return new


def places_of(labels: Tensor, names: Sequence[str], vocabulary: Vocabulary) -> tuple[tuple[float, float], ...] | None:
    """Return where the objects `names` are in a picture of `labels`, as `with_objects` takes them; None if unknown."""
    places = labels[vocabulary.encode(names), PLACE].tolist()
    return None if any(x == OUTSIDE for x, _ in places) else tuple((x, y) for x, y in places)
