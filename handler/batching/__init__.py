"""Arguments of several calls of one module, put together and taken apart: pure tensor code."""
