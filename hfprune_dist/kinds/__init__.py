"""What each kind of stage is: its settings, from what a plan makes them, its inputs, and the memory that it needs.

``config.parameters.KINDS`` lists all kinds, and ``hfprune_dist/stages/<kind>.py`` is what each of them does. ``memory``
is what the formulas have in common, and where weights lie. Torch-free, so that a login node answers at once.
"""
