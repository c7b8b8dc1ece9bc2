"""The commands beside the server: pack, verify, serve, ship and more. Imports only ``handler``."""

from handler import __version__

__all__ = ["__version__"]
