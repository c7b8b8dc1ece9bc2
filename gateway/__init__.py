"""One process in front of TorchServe instances: OpenAI's images API, keys, limits, re-sending."""
