"""Studies of finished models and of variants of the recipe. Imports the modules of the trainer, never its commands.

Start reading in `compare.py`, which trains variants under one budget; `compare_report.py` writes its report. The other
modules stand alone: `calibrate.py`, `limit.py`, `memorisation.py`, and `card.py`, which writes a checkpoint's card.
"""
