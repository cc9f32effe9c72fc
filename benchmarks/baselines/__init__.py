"""What ours is compared with, on the same network and weights: samplers, training loops and servers of others."""
