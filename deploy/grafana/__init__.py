"""The board, and the script that makes it."""
