"""Files that clients send: multipart forms, PNGs with recipes, zips of pictures."""
