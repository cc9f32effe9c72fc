"""The entry point by which the trainer finds what this package has."""

from trainer.plugins import Plugins, Study


def register(plugins: Plugins) -> None:
    """Add to the trainer what only i-CLEVR has."""
    from iclevr import commands, report

    plugins.commands["render"] = commands.render
    plugins.presets["report"] = report.REPORT
    plugins.evaluators[".pth"] = "iclevr.course"
    plugins.renders = "iclevr.studies.renders"
    plugins.studies |= {
        "arrangements": Study("iclevr.studies.arrangements"),
        "places": Study("iclevr.studies.places", needs=()),
        "edits": Study("iclevr.studies.edits", needs=()),
    }
