"""Everything that runs inside a TorchServe worker; packed whole into every archive.

Imports point one way: ``diffusers_handler`` → ``service`` → ``engine`` → ``merging``, ``policy``;
``service`` → ``wire``, ``replies`` → ``request`` → ``errors``; ``loading`` → ``archive``, ``config``.
Only ``diffusers_handler`` knows TorchServe, only ``loading`` and ``engine`` know diffusers.
"""
