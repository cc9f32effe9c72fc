"""What is trained, one module each: the denoiser, the evaluator, the layout network and the distilled denoiser.

A module holds its configuration, how its network starts, and its `Objective` for the loop in `train.py`: what is drawn
from the data, the loss, what is shown while it trains, and what is published. The upsampler's is in `stages/`.
"""
