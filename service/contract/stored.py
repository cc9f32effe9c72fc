"""What two consecutive versions of the service must agree on, so that they can run side by side (docs/deploy.md).

A record that one version writes, the other reads. Every field added from now on needs a default; it is written only
if it has another value, and a reader that does not know it ignores it. Knows no Redis, HTTP or torch.
"""

import functools
import inspect
import json
from collections.abc import Iterable
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict

from shared.options import IGNORE_UNKNOWN

# The fields that every version knows. They are always written, because defaults may change. Never add to them.
FIRST_FIELDS = frozenset(
    """accuracy best clip_x0 columns created_at digest eta evaluator exact exact_match f1 first guidance
    guidance_interval id index job kind labels layout layouts model name options owner position probabilities recipe
    repeats request_id run_seed sampler scores seed sent spacing steps traceparent trajectory verdicts version webhook
    webhook_events x y""".split()  # noqa: SIM905
)


class Stored(BaseModel):
    """A record in Redis as JSON. Its fields do not change once it is created."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def read(cls, raw: bytes | str) -> Self:
        """Parse a record. ValidationError if this version cannot read it."""
        return cls.model_validate_json(raw, context=IGNORE_UNKNOWN)

    def write(self) -> str:
        return self.model_dump_json(exclude=unneeded(self))


def unneeded(value: Any) -> dict[Any, Any]:
    """Return what to leave out of a dump (pydantic's `exclude`): later fields that have their default."""
    found: dict[Any, Any] = {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, BaseModel):
        later, with_models = _fields(type(value))
        found = {name: True for name, default in later if getattr(value, name) == default}
        items = ((name, getattr(value, name)) for name in with_models if name not in found)
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, inner in items:
        if parts := unneeded(inner):
            found[key] = parts
    return found


@functools.cache
def _fields(model: type[BaseModel]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return the model's later fields with their defaults, and the names of those that may contain models."""
    fields = model.model_fields.items()
    later = [(name, one.get_default(call_default_factory=True)) for name, one in fields if name not in FIRST_FIELDS]
    return later, [name for name, one in fields if _has_models(one.annotation)]


def _has_models(kind: Any) -> bool:
    """Whether a type is a model, or has one among its arguments."""
    return (inspect.isclass(kind) and issubclass(kind, BaseModel)) or any(map(_has_models, get_args(kind)))


def fingerprint(request: BaseModel, *, without: set[str]) -> dict[str, Any]:
    """Return a request's fields for comparison with another: equal for equal requests, whichever version reads them."""
    parts = unneeded(request) | dict.fromkeys(without, True)
    found: dict[str, Any] = json.loads(request.model_dump_json(exclude=parts))
    return found
