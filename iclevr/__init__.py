"""What only i-CLEVR has, the data set of the shipped models. No other package imports this one.

Start reading in `scenes/scene.py`, which places objects; `scenes/` renders stand-in pictures, `studies/` measures with
them what a denoiser of these labels draws. `labels.py` holds the labels, `commands.py` has `trainer render`,
`report.py` the recipe of our baseline, `course.py` the evaluator's file of a university course. `plugin.py` adds all of
it to the trainer, which works without it.
"""
