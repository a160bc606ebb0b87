"""A rank of a Slurm job as a process of the fork server: takes the arguments of the interpreter that it stands in for.

The server has imported the project from here; the rank imports it anew, from the snapshot that is on its PYTHONPATH.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # An interpreter reads this when it starts, long before this process was forked.
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("hfprune_dist", "hfprune_launch"):
            del sys.modules[name]
    from hfprune_launch.slurm.job import main

    main(Path(sys.argv[-1]))  # after "-u -m hfprune_launch.slurm.job"
