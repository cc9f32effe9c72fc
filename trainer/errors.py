"""The error that the command line reports in one line, without a traceback."""


class TrainerError(Exception):
    """A wrong argument, file or folder. The message says what to do. Any function of the trainer may raise it."""
