"""The diffusion model: schedules, samplers, the stepping loop, the network.

Start reading in `denoise.py`. A sampler (`samplers.py`) is a table of coefficients; the loop knows no solver.
"""
