"""The endpoints, one module for each subject.

Start reading in `generate.py`. A route checks its request, creates its job by `submit.py`, and answers by `answers.py`.
"""
