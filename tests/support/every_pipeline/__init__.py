"""A sweep over every pipeline class of diffusers: built tiny, called directly, and in flight.

Everything is made from configurations with random weights, so that it runs anywhere, offline::

    python -m tests.support.every_pipeline                 # the whole sweep
    python -m tests.support.every_pipeline --only 'Flux'   # some classes

`catalogue` lists the classes, `parts` has a tiny instance of each component class, `families` says
what a pipeline needs beside them, `inputs` what its calls are given; `judge` compares.
"""
