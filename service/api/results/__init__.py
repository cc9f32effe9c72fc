"""The results of jobs as clients fetch them, from Redis or storage (`reader.py`), also as a zip (`zip_stream.py`).

Imports nothing of api.
"""
