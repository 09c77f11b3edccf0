"""Training of a codec, and synthetic speech and music to train one on."""
