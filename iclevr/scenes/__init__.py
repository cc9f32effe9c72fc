"""Stand-in pictures for i-CLEVR. Imports no other subpackage.

Start reading in `scene.py`, which places objects; `render.py` traces rays, `render_folder.py` writes a data set folder.
"""
