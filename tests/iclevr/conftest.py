"""The trainer's command line in an empty folder, and a small data set, as for its own tests."""

from tests.trainer.conftest import _quick_networks, command, data

__all__ = ["_quick_networks", "command", "data"]
