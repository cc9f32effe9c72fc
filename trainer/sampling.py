"""Gives a checkpoint sampling options of its own. Measures nothing: `benchmarks/choices/sampling.py` does."""

from typing import Any

from shared.checkpoint import load, publish
from shared.options import SamplingOptions, default_options
from shared.registry import resolve
from shared.storage import Location


def set_sampling(storage: Location, name: str, changes: dict[str, Any]) -> SamplingOptions:
    """Changes what the denoiser `name` is sampled with where a request says nothing; returns all of its options.

    The tensors, and so the digest, stay. CheckpointError; pydantic.ValidationError for options that cannot be.
    """
    info, tensors = load(resolve(storage, name, "denoiser"))
    options = SamplingOptions.model_validate({**default_options(info.config).model_dump(), **changes})
    publish(
        storage,
        name,
        tensors,
        kind=info.kind,
        vocabulary=info.vocabulary,
        config={**info.config, "sampling": options.model_dump(mode="json")},
        training=info.training,
        created_at=info.created_at,
    )
    return options
