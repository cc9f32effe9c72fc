"""`python -m deploy.prometheus_rule` prints the alerts of deploy/monitoring as the Prometheus operator's object."""

from pathlib import Path

ALERTS = Path(__file__).parent / "monitoring" / "alerts.yml"
HEAD = """\
# Written by `python -m deploy.prometheus_rule` from deploy/monitoring/alerts.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: labelgrid
  namespace: labelgrid
spec:
"""


def document() -> str:
    """Return the object as YAML: the rules' lines, indented."""
    lines = ALERTS.read_text().splitlines()
    return HEAD + "".join(f"  {line}\n" for line in lines[lines.index("groups:") :])


if __name__ == "__main__":
    print(document(), end="")
