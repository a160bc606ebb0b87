#!/bin/sh
# Stands in for Python where a Slurm job starts a rank: a process of the fork server runs it (clusters.FORKED_RANKS).
tests=$(dirname "$0")
exec python3 -IS "$tests/fork_client.py" "$HFPRUNE_FORK_SERVER" "$tests/slurm_rank.py" "$@"
