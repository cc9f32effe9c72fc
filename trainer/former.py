"""Commands that are gone, and what replaces them. They go with version 0.3. Imports nothing."""

from typing import Final

FORMER: Final = {
    "locate": "import DATA",
    "fit-evaluator": "train evaluator",
    "fit-layouts": "train layouts --name NAME",
    "distill": "train distilled",
    "upsample": "train upsampler",
    "limit": "score FILE --renders",
    "set-sampling": "configure NAME --sampler, --steps, --spacing, --guidance, --interval",
    "set-support": "configure NAME --objects, --proportions",
    "move-upsampler": "configure NAME --base BASE",
    "coverage": "evaluate NAME --only coverage --data DATA",
    "memorisation": "evaluate NAME --only coverage --trained-on DATA --data HELD_OUT",
    "spectrum": "evaluate NAME --only spectrum --data DATA",
    "two-sample": "evaluate NAME --only two-sample --data DATA",
    "arrangements": "evaluate NAME --only arrangements --data DATA",
    "places": "evaluate NAME --only places",
}


def replaced(arguments: list[str]) -> str | None:
    """Return the error of a command that is gone; None for any other."""
    name, following = [*arguments, "", ""][:2]
    new = FORMER.get(name)
    if name == "train" and following.startswith("-") and following != "--help":
        new = "train denoiser"
    return f"`trainer {name}` is now `trainer {new}`" if new else None
