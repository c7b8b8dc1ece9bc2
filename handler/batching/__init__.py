"""Merging the arguments of several module calls and splitting the output: pure tensor code."""
