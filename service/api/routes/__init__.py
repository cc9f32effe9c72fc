"""The endpoints, one module for each subject.

Start reading in `generate.py`. A route checks its request and leaves jobs to `submit.py`.
"""
