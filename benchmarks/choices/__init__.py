"""Measurements behind choices made in the code; each is run by itself."""
