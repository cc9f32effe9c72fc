"""What is trained besides the denoiser: the evaluator, the layout network, the upsampler, and the distilled denoiser.

Each module holds one of them: its data, its loss and how it is published. `fit_layouts.py` is part of every run with
positions; the others have a command of their own.
"""
