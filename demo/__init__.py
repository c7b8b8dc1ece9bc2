"""The embedded default: a tiny Stable Diffusion pipeline that draws pixel art of coloured shapes."""
