"""Turns a data set of another layout into folders that the trainer reads. Knows no network.

`formats.py` reads image folders, CSV files and COCO annotations; `splits.py` keeps their own splits apart; `folders.py`
divides the pictures into training and held-out ones and writes them.
"""
