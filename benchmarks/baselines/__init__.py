"""What ours is compared with, on the same network and weights: the report's code and diffusers."""
