"""Put on PYTHONPATH by fault tests: kills or slows down ranks at chosen file-system operations.

Ranks are forks of a process that has read this, so whether it concerns them is asked at each operation.

KILL_RANK=r       the process whose rank is r ("launcher": the one without a rank)
KILL_AT=n         it dies before its n-th operation that makes something durable or visible (0: never)
KILL_MATCH=text   counting only operations on paths that contain this text; without it, all-reduces are counted
REFUSE_RANK=r     the process whose rank is r must not replace any file
REFUSE_MATCH=text whose path contains this text
SLOW_MATCH=text   ranks sleep before each operation on a path that contains this text
SLOW_S=seconds    how long they sleep
SLOW_WHILE=file   they sleep on while this file exists
SLOW_STARTS=n     only in the first n starts of a job; without it, in all of them
"""

import os


def rank():
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "launcher"


if "KILL_RANK" in os.environ:
    from kill import arm, arm_reductions

    def is_chosen():
        return os.environ.get("KILL_RANK") == rank()

    if "KILL_MATCH" in os.environ:
        arm(int(os.environ["KILL_AT"]), os.environ["KILL_MATCH"], condition=is_chosen)
    elif is_chosen():
        arm_reductions(int(os.environ["KILL_AT"]))
if "REFUSE_RANK" in os.environ:
    from kill import refuse

    refuse(os.environ["REFUSE_MATCH"], lambda: os.environ.get("REFUSE_RANK") == rank())
start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
if "SLOW_MATCH" in os.environ and start < int(os.environ.get("SLOW_STARTS") or start + 1):
    from kill import slow_down

    slow = float(os.environ["SLOW_S"]), os.environ.get("SLOW_WHILE")
    slow_down(os.environ["SLOW_MATCH"], *slow, condition=lambda: rank() != "launcher")
