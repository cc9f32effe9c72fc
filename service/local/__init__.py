"""All of the service on one machine: `python -m service` and the demo. Imports client and telemetry."""
