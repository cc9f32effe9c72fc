"""Logs, metrics and traces. Imports contract and settings."""
