"""Stages, which read and write artifacts. The module named after a kind of stage has ``run(context)``; these modules
never import each other. ``prune_*``, ``contest`` and ``shape_search`` are parts of prune; ``context`` and ``training``
are shared.
"""
