"""What the command line reports in one line, without a traceback."""


class TrainerError(Exception):
    """A wrong argument, file or folder; the message says what to do."""
