"""Stages, which read and write artifacts. The module named after a kind of stage has ``run(context)``; these modules
never import each other; ``context`` and ``training`` are shared.

A prune stage in reading order: ``prune`` decides and writes; ``shape_search`` says which units stay and, where shapes
are searched for, measures candidates cheaply and finalists fitted; ``prune_refit`` refits what stays.
"""
