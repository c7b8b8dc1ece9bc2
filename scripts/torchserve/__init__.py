"""One TorchServe instance: its options, its process, and curl against it."""
