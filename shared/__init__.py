"""What trainer and service share: label files, checkpoints, the evaluator, and `diffusion/`. Imports neither of them.

`vocabulary`, `options`, `storage` and `checkpoint` import no torch, so the API process may use them.
"""
