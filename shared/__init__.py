"""What trainer and service share: label files, sampling options, checkpoints, the evaluator and the diffusion model.

Imports neither of them. `vocabulary`, `options`, `support`, `storage`, `checkpoint`, `registry` and `rgb` import no
torch, so the API process may use them. Start reading in `diffusion/denoise.py` (the stepping loop) or `checkpoint.py`
(the file that trainer and service exchange).
"""
