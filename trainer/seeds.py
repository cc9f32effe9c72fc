"""Which seeds the trainer takes. Imports no torch, so that `--help` stays fast."""

from typing import Final

MAX_SEED: Final = 2**53 - 1  # as of a request to the service, so that its pictures can be sampled again
