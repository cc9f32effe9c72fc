"""What is trained, one module each: denoiser, evaluator, layout network, distilled denoiser, upsampler, and one step.

A module holds its configuration, how its network starts, and its `Objective` for the loop in `train.py`: what is drawn
from the data, the loss, what is shown while it trains, and what is published.
"""
