"""From a request to its reply: read, submit, wait, encode, answer exactly once."""
