"""What each kind of stage is: its settings, from what a plan makes them, its inputs, and the memory that it needs.

``<kind>.py`` describes a kind, ``hfprune_dist/stages/<kind>.py`` is what it does, and ``config.parameters.KINDS`` lists
them all. ``memory`` is what their formulas have in common, ``placement`` where weights lie. Torch-free, so that a
login node answers at once.
"""
