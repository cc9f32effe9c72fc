"""The upsampler's objective, with its losses. The other objectives are in `objectives/`."""
