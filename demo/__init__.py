"""The embedded default: a tiny Stable Diffusion pipeline for pixel art of coloured shapes."""
