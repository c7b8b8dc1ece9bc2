"""What runs beside the server: download, pack, inspect and verify. Imports only ``handler``."""

from handler import __version__

__all__ = ["__version__"]
