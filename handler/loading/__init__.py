"""From an unpacked archive to a diffusers pipeline on its device."""
