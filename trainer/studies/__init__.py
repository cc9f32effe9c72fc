"""Studies of finished models and of variants of the recipe. Imports the modules of the trainer, never its commands.

Start reading in `compare.py`, which trains variants under one budget; `compare_report.py` writes its report. `card.py`
writes a checkpoint's card, `former_card.py` puts marks into an older one; `markdown.py` serves card and report.
`renders.py` scores renders. The others are those of `trainer evaluate`: `study.py` has their contract, and each stands
alone.
"""
