"""Writing, reading and checking archives."""
