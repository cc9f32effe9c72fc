"""Stand-in pictures for i-CLEVR: where objects are placed, the ray tracer, and finding objects in real pictures."""
