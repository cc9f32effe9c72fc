"""Renders data, fits the evaluator, trains the denoiser, scores checkpoints. Never imports the service."""
