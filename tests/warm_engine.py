"""An engine that is imported once; forks of it answer requests. ``python warm_engine.py ENGINE``, with nothing of ours.

Each line of its input has the request's file, the answer's, and a folder for temporary files and a log; each line that
it prints says how the fork ended.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hfprune_dist" / "engines"))
import in_engine

LAZY = {"vllm": "vllm.entrypoints.llm", "openvino": "optimum.intel.openvino", "mlx": "mlx_lm.utils"}
LAZY |= {"ctranslate2": "ctranslate2.converters", "llama.cpp": "llama_cpp_py_sync"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")
    importlib.import_module(LAZY[sys.argv[1]])
    for line in sys.stdin:
        asked, answered, folder = json.loads(line)
        if not (fork := os.fork()):
            log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            tempfile.tempdir = folder
            sys.argv[2:] = [asked, answered]
            in_engine.main()
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])}\n")
        answers.flush()


if __name__ == "__main__":
    main()
