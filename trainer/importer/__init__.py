"""Turns a data set of another layout into folders that the trainer reads. Knows no network.

`formats.py` reads image folders, CSV files and COCO annotations; `folders.py` splits the pictures and writes them.
"""
