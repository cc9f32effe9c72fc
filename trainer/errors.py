"""The errors that the command line reports in one line, without a traceback."""

import signal


class TrainerError(Exception):
    """A wrong argument, file or folder. The message says what to do. Any function of the trainer may raise it."""


class StoppedError(TrainerError):
    """A run that a signal has stopped. Its state is saved."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; the same command goes on from there")
        self.number = number
