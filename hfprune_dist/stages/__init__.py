"""Stages, which read and write artifacts. The module named after a kind of stage has ``run(context)``; these modules
never import each other; ``context`` and ``training`` are shared.

A prune stage in reading order: ``prune`` decides and writes; where shapes are searched for, ``prune_plain`` finds one
for all layers and ``prune_shapes`` one for each, by ``shape_search``, which measures candidates cheaply and finalists
fitted; ``contest`` says which units the layers of a shape lose; ``prune_refit`` and ``prune_norms`` refit what stays.
"""
