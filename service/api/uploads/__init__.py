"""What clients upload: PNGs with recipes, zips of pictures.

Start reading in `picture_zip.py`. Imports nothing else of the API.
"""
