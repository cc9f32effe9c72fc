"""The worker process: claims pictures, samples them in one batch, judges and stores them.

The only subpackage that imports torch. Start reading in `process.py`, then `runner.py` (its loop) and `engine.py` (the
batch). Imports shared, store and below; never api or webhooks.
"""
