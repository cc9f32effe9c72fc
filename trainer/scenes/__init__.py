"""Stand-in pictures for i-CLEVR, and the positions of objects in pictures. Imports no other subpackage of the trainer.

Start reading in `scene.py`, which places objects; `render.py` traces rays, `render_folder.py` writes a data set folder,
and `locate.py` finds objects in real pictures.
"""
