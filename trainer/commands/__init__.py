"""The commands of `python -m trainer`, one module for each group: options, progress bars and printed tables.

Start reading in `training.py`. The commands call the other modules of the trainer, and no module imports a command.
Modules that import torch are imported within the commands, so that `--help` is fast.
"""
