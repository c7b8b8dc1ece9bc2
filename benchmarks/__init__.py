"""What the project's numbers come from; a command writes one JSON and one table."""
