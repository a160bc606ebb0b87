"""Engines that serve models: what each can hold, and checks that it computes what transformers does.

``table`` is what plans, cards and refusals know of engines. ``check`` runs ``in_engine`` in an engine's own Python.
"""
