"""Requests that nobody waits for: kept in a database, drawn when there is room."""
