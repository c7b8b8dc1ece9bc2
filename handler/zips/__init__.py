"""Reading untrusted zip files."""
