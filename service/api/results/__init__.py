"""The results of jobs as clients fetch them. `zip_stream.py` packs pictures. Imports nothing of api."""
