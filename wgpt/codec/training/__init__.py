"""Training of a codec on recordings, measures of it, and synthetic speech and music."""
