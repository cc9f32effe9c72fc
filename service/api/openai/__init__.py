"""/v1: the images API of OpenAI, so that its clients work here."""
