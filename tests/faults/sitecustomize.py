"""Put on PYTHONPATH by fault tests: kills a process with SIGKILL at a chosen file-system operation.

KILL_RANK=r       the process whose RANK is r ("launcher": the one without a RANK)
KILL_AT=n         before its n-th operation that makes something durable or visible (0: never)
KILL_MATCH=text   counting only operations on paths that contain this text
"""

import os

if os.environ.get("KILL_RANK") == os.environ.get("RANK", "launcher"):
    from kill import arm

    arm(int(os.environ["KILL_AT"]), os.environ["KILL_MATCH"])
