"""What a package for one data set adds to the trainer. The trainer itself knows no data set, and works without any.

Such a package names a function `register` as an entry point (`pyproject.toml`), which is given the `Plugins` and adds
what it has. It must not import torch there, so that `--help` is fast: studies are named, and functions import what they
need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final

from shared.options import SamplingOptions

GROUP: Final = "labelgrid.plugins"  # of entry points, each a function `register`


@dataclass(frozen=True)
class Study:
    """A study of `trainer evaluate`. needs: options, by their names in Subject. module: has its `run`."""

    module: str
    needs: tuple[str, ...] = ("data",)


@dataclass(frozen=True)
class Preset:
    """A recipe that `train denoiser --preset`, `compare` and, for its sampling, `score` and `evaluate` know."""

    recipe: Mapping[str, Any]  # fields of `trainer.config.TrainConfig`
    sampling: SamplingOptions
    epochs: int  # that it is trained for, unless --minutes or --steps say otherwise


@dataclass
class Plugins:
    """All that was registered, each by its name on the command line."""

    commands: dict[str, Callable[..., None]] = field(default_factory=dict)  # with Typer's annotations
    studies: dict[str, Study] = field(default_factory=dict)  # one of the trainer's own names takes its place
    presets: dict[str, Preset] = field(default_factory=dict)
    evaluators: dict[str, str] = field(default_factory=dict)  # suffix of a file -> module that can `read`, `write` it
    renders: str | None = None  # module whose `render_runs` scores fresh renders of label lists, as `score --renders`


@cache
def plugins() -> Plugins:
    """Return what the installed packages register under GROUP. One whose files are absent adds nothing."""
    registered = Plugins()
    for point in entry_points(group=GROUP):
        try:
            register = point.load()
        except ModuleNotFoundError as error:
            if not (error.name and point.module.startswith(error.name)):
                raise
            continue
        register(registered)
    return registered
