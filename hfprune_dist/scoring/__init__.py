"""The calibration pass: sums over windows of text, from which units are scored.

In each round, a rank's ``shard_scorer`` runs the model over a shard of the windows, and ``accumulation`` adds all
ranks' shards to the sums so far, which it saves and resumes from.
"""
