"""What clients upload: JSON or form bodies, PNGs with recipes, zips of pictures.

Start reading in `body.py`. Imports nothing else of the API.
"""
