"""Trains the denoiser and the evaluator. Imports shared, never the service.

Start reading in `train.py`. `scenes/` renders stand-in pictures, `studies/` compares and measures, `commands/` is the
command line.
"""
