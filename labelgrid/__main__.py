"""`labelgrid COMMAND`: the commands of `python -m service`, `python -m service.client` and `python -m trainer` in one.

Help and usage errors come from the table below, so that they load none of the three. A test compares it with them.
"""

import importlib
import importlib.util
import os
import sys

from labelgrid.weights import FOLDER, default_storage

# For each module with a command line: the extra that it needs, a heading, and its commands.
SERVICE, CLIENT, TRAINER = "service.__main__", "service.client.__main__", "trainer.__main__"
EXTRAS = {SERVICE: "serve", CLIENT: "client", TRAINER: "train"}
HEADINGS = {CLIENT: "Use a service", SERVICE: "Run a service", TRAINER: "Train models"}
COMMANDS = {
    CLIENT: {
        "generate": "generate and score pictures",
        "edit": "draw a picture again with some objects changed",
        "score": "score the model or given pictures on a test file",
        "wait": "wait for a job and print its result",
        "jobs": "list jobs, newest first",
        "cancel": "cancel a queued or running job",
        "labels": "list the labels that a model knows",
        "models": "list the models of a service",
    },
    SERVICE: {
        "serve": "run Redis, a worker and the API on this machine",
        "api": "run the API",
        "worker": "run a worker, which generates and scores pictures",
        "check": "exit with 1 unless a worker of this host is alive",
        "keys": "make an API key",
        "webhook-secret": "print the secret that verifies an owner's webhooks",
        "settings": "print all settings, as Markdown",
        "demo": "start everything, generate eight pictures, and stop",
    },
    TRAINER: {
        "import": "import a data set: pictures and labels",
        "render": "render stand-in pictures in the data set's own layout",
        "train": "train a denoiser, an evaluator, layouts, a distilled denoiser or an upsampler",
        "evaluate": "study a checkpoint: coverage, memorisation, sharpness and more",
        "compare": "train variants under one budget and compare them",
        "configure": "change parts of a denoiser without training",
        "promote": "make a checkpoint the default of its kind",
        "export": "write a checkpoint as ONNX, or an evaluator as checkpoint.pth",
        "card": "write a checkpoint's model card again",
    },
}
ELSEWHERE = "`python -m trainer score` scores a checkpoint without a service."
NEEDS_WEIGHTS = {"serve", "api", "worker", "demo"}
NEEDS_TORCH = {"serve", "worker", "demo"}
WRONG_USAGE = 2  # exit code, as when a command gets an unknown option


def usage() -> str:
    """Return the help: all commands, by module."""
    lines = ["Usage: labelgrid COMMAND [OPTIONS]", ""]
    for module, heading in HEADINGS.items():
        lines += [f"{heading}:", *(f"  {name:<16}{what}" for name, what in COMMANDS[module].items()), ""]
    lines += ["`labelgrid COMMAND --help` shows a command's options.", ELSEWHERE]
    return "\n".join(lines)


def use_packaged_weights() -> None:
    """Let the service read the weights that came with the installation, where there are no others."""
    storage = default_storage()
    if "LABELGRID_STORAGE" not in os.environ and storage != FOLDER:
        os.environ["LABELGRID_STORAGE"] = storage


def missing(command: str, module: str) -> str:
    """Return what to install for a command."""
    return f"labelgrid {command} needs more packages: pip install 'labelgrid[{EXTRAS[module]}]'"


def _say(text: str) -> None:
    """Print a text, or as much of it as the reader takes: `head` closes the pipe. A full disk ends the program."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again as it ends
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"labelgrid: the help cannot be written: {error.strerror}")


def main() -> None:
    """Run the command that the arguments name."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("--help", "-h"):
        _say(usage())
        return
    module = next((module for module, commands in COMMANDS.items() if command in commands), None)
    if module is None:
        from trainer.former import replaced

        problem = replaced(sys.argv[1:]) or f"no such command {command!r}; `labelgrid --help` lists them"
        print(f"labelgrid: {problem}", file=sys.stderr)
        sys.exit(WRONG_USAGE)
    if command in NEEDS_TORCH and importlib.util.find_spec("torch") is None:
        sys.exit(missing(command, module))
    if command in NEEDS_WEIGHTS:
        use_packaged_weights()
    sys.argv[0] = "labelgrid"
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"{missing(command, module)} (there is no {error.name})")
    sys.exit(program.main() if module == TRAINER else program.main("labelgrid"))


if __name__ == "__main__":
    main()
