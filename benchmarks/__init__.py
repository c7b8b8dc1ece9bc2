"""What the project's numbers come from; each module is one command with one JSON and one table."""
