"""The trainer: trains the denoiser and the evaluator, and publishes checkpoints. Imports shared, never the service.

Start reading in `train.py`, the training loop; `config.py` holds what every run has. `objectives/` is what the loop
learns, `importer/` reads data sets of other layouts, `studies/` measures finished models and compares recipes,
`commands/` is the command line, `plugins.py` says what a package for one data set may add. Imports point one way:
commands -> studies -> score -> objectives -> train -> importer, data, config.
"""
