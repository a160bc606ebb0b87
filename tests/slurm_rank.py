"""A rank of a Slurm job as a process of the fork server: takes the arguments of submitit's own module.

The server has imported the project from here; the rank imports it anew, from the snapshot that is on its PYTHONPATH.
"""

import sys

from submitit.core.submission import submitit_main

if __name__ == "__main__":
    for name in list(sys.modules):
        if name.partition(".")[0] in ("hfprune_dist", "hfprune_launch"):
            del sys.modules[name]
    sys.argv[1:] = sys.argv[-1:]  # the folder, without "-u -m submitit.core._submit"
    submitit_main()
