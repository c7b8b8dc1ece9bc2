"""What a client may send and gets back. Imports neither torch nor diffusers."""
