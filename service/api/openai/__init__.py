"""/v1: the images API of OpenAI, so that its clients work here. Delete this folder and its line in `app.py` to drop it."""
