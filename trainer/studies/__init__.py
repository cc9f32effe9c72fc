"""Studies of finished models and of variants of the recipe. Imports the modules of the trainer, never its commands.

Start reading in `compare.py`, which trains variants under one budget; `compare_report.py` writes its report. `card.py`
writes a checkpoint's card. The others are one command each, and stand alone; `markdown.py` serves card and report.
"""
