#!/bin/sh
# Stands in for Python where a Slurm job starts a rank: a process of the fork server runs it (clusters.FORKED_RANKS),
# unless it belongs to the first $INTERPRETED_STARTS starts of its stage (clusters.FORKED_SUCCESSORS).
tests=$(dirname "$0")
for attempt; do :; done # the last argument is the attempt's folder, named by its number
if [ $((${attempt##*/} + ${SLURM_RESTART_COUNT:-0})) -le "${INTERPRETED_STARTS:-0}" ]; then
    exec "$INTERPRETER" "$@"
fi
exec python3 -IS "$tests/fork_client.py" "$HFPRUNE_FORK_SERVER" "$@"
