"""The file that TorchServe imports from an archive: it looks for exactly one class defined here."""

import sys

# A model directory may be the archive's own folder, in which nothing may change.
sys.dont_write_bytecode = True

try:
    from handler.diffusers_handler import DiffusersHandler
except ImportError as error:
    # On an ImportError TorchServe goes on to look for a handler of its own with this file's name,
    # and reports only that it found none.
    raise RuntimeError(
        f"the worker's Python cannot import the handler: {error}; "
        "install what the archive's requirements.txt names"
    ) from error


class Entry(DiffusersHandler):
    """`DiffusersHandler`, under the roof of the archive's entry file."""
