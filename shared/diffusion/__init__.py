"""The diffusion model: noise schedules, samplers, the stepping loop and the network.

A sampler (`samplers.py`) is a table of coefficients; the stepping loop (`denoise.py`) knows no solver. Start reading
there, then `unet.py`. `model.py` builds all of it from a checkpoint. Imports neither registry nor evaluator.
"""
