"""What only i-CLEVR has, the data set of the shipped models. No other package imports this one.

Start reading in `scenes/scene.py`, which places objects; `scenes/` renders stand-in pictures, `studies/` measures with
them what a denoiser of these labels draws. `labels.py` holds the labels, `commands.py` has `trainer render`,
`report.py` the recipe of our baseline, `course.py` the evaluator's file of a university course. `register` adds all of
it to the trainer, which works without it.
"""

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
