"""The worker process: claims pictures, samples them in one batch, judges and stores them.

The only subpackage that imports torch, though not before `process.py` is imported. Start reading in
`process.py` (the RQ worker), then `runner.py` (its loop) and `engine.py` (the batch). Imports shared, store
and below; never api or webhooks.
"""


def answer_doorbell(model: str) -> None:
    """Have a model loaded that has work. RQ calls this by its name, which `store/doorbell.py` writes to Redis."""
    from service.store.doorbell import ModelName
    from service.worker import process

    assert process.runner is not None, "answer_doorbell runs in a worker process only"
    process.runner.ring(ModelName.model_validate_json(model))
