"""What clients upload: PNGs with recipes, zips of pictures. Imports nothing else of the API."""
