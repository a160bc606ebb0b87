"""Meanings of words in a job's logs: the table from which ``exit_causes`` determines why a job ended."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hfprune_launch.slurm.causes import Cause


@dataclass(frozen=True)
class Sign:
    """Words in a log, or in what a rank said as it failed.

    Attributes:
        meaning: explanation for the user of what has happened and what to do.
    """

    words: re.Pattern[str]
    cause: Cause
    meaning: str


def _sign(words: str, cause: Cause, meaning: str) -> Sign:
    return Sign(re.compile(words, re.IGNORECASE | re.MULTILINE), cause, meaning)


OUT_OF_MEMORY = _sign(
    r"OutOfMemoryError|out of memory|can't allocate memory|cannot allocate memory|MemoryError|std::bad_alloc"
    r"|oom[-_ ]kill|exceeded (job |step )?memory limit|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    Cause.OUT_OF_MEMORY,
    "ran out of memory; give the stage more nodes or memory in the profile",
)

# What the batch script writes if a setup line fails.
SETUP_FAILED = "hfprune: setup failed"
# What the batch script and every rank write first, followed by the number of times the job had been requeued.
START = "hfprune: start"

# In order of precedence: a sign explains those below it.
SIGNS = (
    _sign(
        rf"^{SETUP_FAILED}.*$|environment\.sh: line \d+: syntax error.*$",
        Cause.INPUT,
        "a line of the profile's setup failed; correct it, try it in a shell on a compute node",
    ),
    _sign(
        r"^.*prolog.*(failed|did not exit normally|error).*$",
        Cause.BAD_NODE,
        "a prolog of the cluster failed, before the stage began; tell the cluster's administrators",
    ),
    _sign(
        r"^.*(couldn't chdir to|could not open (stdout|stderr|stdin) file|execve\(\):.*no such file"
        r"|No module named '?submitit|stale file handle).*$",
        Cause.BAD_NODE,
        "a node does not see this project's Python or --out; both must lie on file systems that all nodes share",
    ),
    _sign(
        r"^.*(invalid mpi type|cannot (find mpi plugin|create mpi context)|plugin name for mpi/"
        r"|\bPMIX? ?(error|server)|\bPMI[2x]?_\w*init|mpi/pmi\w*:.*(error|fail)).*$",
        Cause.INPUT,
        "srun could not set up its MPI support, which this project does not use; "
        "srun_args: [--mpi=none] in the profile turns it off",
    ),
    _sign(
        r"^.*(unable to satisfy cpu bind|cpu binding outside of job step allocation).*$",
        Cause.INPUT,
        "srun could not bind ranks to cores; srun_args: [--cpu-bind=none] in the profile turns binding off",
    ),
    _sign(
        r"^.*(SLURM_MEM_PER_\w+.* are mutually exclusive|srun: (error: )?unable to create step for job \d+: "
        r"(more processors|requested node|memory required|invalid|requested partition)"
        r"|srun: (fatal|unrecognized option|invalid option)).*$",
        Cause.INPUT,
        "srun refused to start the ranks as they were asked for; check the profile, above all its sbatch and "
        "srun_args, and what its setup and environment set of Slurm's variables",
    ),
    _sign(
        r"^.*(task launch for .* failed on node|invalid job credential|credential (expired|replayed)"
        r"|munge decode failed|protocol authentication error).*$",
        Cause.BAD_NODE,
        "Slurm could not start a rank on a node; if it persists, tell the cluster's administrators",
    ),
    _sign(
        r"^.*(uncorrectable ECC|has fallen off the bus|CUDA-capable device\(s\) is/are busy|no CUDA-capable device"
        r"|CUDA driver version is insufficient|unspecified launch failure|NVLink error).*$",
        Cause.BAD_NODE,
        "a GPU of a node, or its driver, is at fault; if it persists, tell the cluster's administrators",
    ),
    _sign(
        r"^.*op\.preamble\.length <= op\.nbytes.*$",
        Cause.CODE,
        "the ranks entered different collectives, a mistake in this project's code; please report it with the log",
    ),
)

# A rank waited in a collective for one that did not come.
COLLECTIVE_TIMEOUT = _sign(
    r"^.*(timed out waiting \d+ ?ms for (recv|send)|timed out after \d+ seconds waiting for clients"
    r"|client socket has timed out|failed to pass monitoredBarrier|caught collective operation timeout"
    r"|wait timeout after \d+).*$",
    Cause.COLLECTIVE_TIMEOUT,
    "a rank did not come to a collective within runtime.collective_timeout_minutes: it hangs, or is much slower than "
    "the others; see its log",
)


def find_sign(text: str, signs: Iterable[Sign] = SIGNS) -> tuple[Sign, str] | None:
    """Return the first sign of the table that occurs in a text, and its words there."""
    for sign in signs:
        found = sign.words.search(text)
        if found is not None:
            return sign, found[0].strip()
    return None


@dataclass(frozen=True)
class Death:
    """The first rank that srun saw end badly; srun then ends all others.

    Attributes:
        node, ranks: in Slurm's notation.
        how: in srun's words, e.g. ``Exited with exit code 1`` or ``Segmentation fault``.
    """

    node: str
    ranks: str
    how: str


_DEATH = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)
# srun's name of a signal -> the signal, the cause, and its meaning.
SIGNALS = {
    "Segmentation fault": ("SIGSEGV", Cause.CRASH, "a fault of a native library, or of the node"),
    "Bus error": ("SIGBUS", Cause.CRASH, "a file cut short while being read, a full /dev/shm, or a fault of the node"),
    "Aborted": ("SIGABRT", Cause.CRASH, "a native library gave up; its last words are in the rank's log"),
    "Illegal instruction": ("SIGILL", Cause.CRASH, "a library was built for another kind of CPU than the node's"),
    "Floating point exception": ("SIGFPE", Cause.CRASH, "a fault of a native library"),
    "CPU time limit exceeded": (
        "SIGXCPU",
        Cause.RESOURCE_LIMIT,
        "a limit on CPU time (ulimit -t) on the nodes; lift it",
    ),
    "File size limit exceeded": (
        "SIGXFSZ",
        Cause.RESOURCE_LIMIT,
        "a limit on files (ulimit -f) on the nodes; lift it",
    ),
    "Killed": ("SIGKILL", Cause.KILLED, "by hand, or by the node, for want of memory perhaps"),
    "Terminated": ("SIGTERM", Cause.KILLED, "by hand, or by the node"),
}


def first_death(text: str) -> Death | None:
    """Return what srun says about the first rank that ended badly; later ones were ended by srun itself."""
    found = _DEATH.search(text)
    return None if found is None else Death(found[1], found[2], found[3])


def last_start(text: str) -> int | None:
    """Return the number of the last start that a log has lines of, counted from 0; None if it doesn't say."""
    starts = re.findall(rf"^{START} (\d+)$", text, re.MULTILINE)
    return int(starts[-1]) if starts else None


def since_last_start(text: str) -> str:
    """Return the part of a log that a requeued job has written since its last start."""
    starts = re.findall(rf"^{START} \d+$", text, re.MULTILINE)
    return text[text.index(starts[-1]) :] if starts else text
