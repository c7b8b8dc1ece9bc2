"""Servers as the peers' users write them; each runs in a virtual environment of its own."""
