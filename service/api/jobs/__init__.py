"""From a checked request to its job, and from the job to the answer: the way of every POST that makes pictures.

Start reading in `submitter.py`.
"""
