"""What runs beside the server: download, pack, inspect and verify. Imports only ``handler``."""

__version__ = "0.1.0"
