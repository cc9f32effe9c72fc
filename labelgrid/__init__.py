"""What an installation offers: `labelgrid.Client`, `labelgrid.AsyncClient` and the command `labelgrid`.

    from labelgrid import Client

Imports the client only: no torch, no Redis, no FastAPI. `models/` are the weights, which the wheel brings along.
"""

from service import client
from service.client import *  # noqa: F403 - the names that it lists

__all__ = client.__all__
