"""The whole service on one machine: `python -m service` and the demo.

May import `client` and `telemetry`. Start reading in `supervisor.py`.
"""
