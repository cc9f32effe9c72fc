"""What clients fetch: jobs and pictures, from Redis or storage (`reader.py`), also as a zip (`zip_stream.py`).

Of the API it imports `slots` only.
"""
