"""Stands in for systemd where there is none: starts and stops the processes of real unit files. For `pages_test.py`.

    python deploy/systemctl.py [enable --now | start | stop | restart] UNIT... | daemon-reload

Of a unit it reads ExecStart, Environment and EnvironmentFile. The process runs as root, in no sandbox, and is not
restarted. Logs and process ids are in /run/units.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
STATE = Path("/run/units")


def read(unit: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the variables of a unit."""
    name, _, instance = unit.partition("@")
    file = f"{name}@.service" if instance else f"{name}.service"
    text = next(path.read_text() for folder in FOLDERS if (path := Path(folder) / file).exists())
    variables, command = dict(os.environ), ""
    for line in text.replace("%i", instance).splitlines():
        key, _, value = line.partition("=")
        if key == "Environment":
            variables.update(part.split("=", 1) for part in shlex.split(value))
        elif key == "EnvironmentFile" and (Path(value.lstrip("-")).exists() or not value.startswith("-")):
            lines = Path(value.lstrip("-")).read_text().splitlines()
            variables.update(
                shlex.join(shlex.split(one)).strip("'").split("=", 1) for one in lines if "=" in one and one[0] != "#"
            )
        elif key == "ExecStart":
            command = value
    words = shlex.split(command)
    return [
        word for one in words for word in (variables.get(one[1:], "").split() if one[0] == "$" else [one])
    ], variables


def start(unit: str) -> None:
    command, variables = read(unit)
    with (STATE / f"{unit}.log").open("ab") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    (STATE / f"{unit}.pid").write_text(str(process.pid))


def stop(unit: str) -> None:
    """End the unit's process, if there is one, and wait for it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pid = int((STATE / f"{unit}.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}/exe").exists() and os.readlink(f"/proc/{pid}/exe"):
            time.sleep(0.1)


def main() -> None:
    STATE.mkdir(exist_ok=True)
    verb, *units = [argument for argument in sys.argv[1:] if argument != "--now"]
    for unit in units:
        if verb in ("stop", "restart"):
            stop(unit)
        if verb in ("start", "restart", "enable"):
            start(unit)


if __name__ == "__main__":
    main()
