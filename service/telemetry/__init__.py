"""Logs, metrics and traces: one module each, used by all processes of the service. Imports contract and settings."""
