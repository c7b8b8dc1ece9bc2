"""Forwards made cheaper: memory formats, lower precision, compiled and captured code."""
