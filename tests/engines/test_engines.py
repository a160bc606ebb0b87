"""Engines on every kind of shape that pruning makes: what the table says loads computes what transformers does, and
nothing else does. Models are random, small, and as wide as engines take them.
"""

import functools
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import warm_engine
from engine_marks import is_there, python_of
from hfprune_launch import export, prune
from masking import write
from merging import tokenizer_that_merges
from tiny import save_tiny, tiny_text

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.engines import ENGINES, fit
from hfprune_dist.engines import check, process
from hfprune_dist.store.atomic_files import read_json
from hfprune_dist.structures.kept import Kept

LAYERS = 4
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": LAYERS, "vocab_size": 300}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
EACH_A_GROUP = {"num_key_value_heads": 4}


def first(kind, *counts):
    """What stays: of each layer, the first so many units."""
    return {kind: [torch.arange(count) for count in counts]}


ALL, WIDTHS = tuple(range(LAYERS)), first("neurons", 700, 648, 768, 600)
HEADS = WIDTHS | first("kv_groups", 2, 1, 2, 2)
# Name -> architecture, changed sizes, layers that stay, units that each keeps.
BY_HAND = {
    "llama-fewer-layers": ("llama", {}, (0, 3), first("neurons", 704, 704)),
    "llama-fewer-groups": ("llama", {}, ALL, first("kv_groups", 1, 1, 1, 1)),
    "qwen2-fewer-groups": ("qwen2", {}, ALL, first("kv_groups", 1, 1, 1, 1)),
    "mistral-3-heads": ("llama", EACH_A_GROUP, ALL, first("kv_groups", 3, 3, 3, 3)),
    "llama-any-widths": ("llama", {}, ALL, WIDTHS),
    "llama-any-heads": ("llama", {}, ALL, HEADS),
    "qwen2-any-heads": ("qwen2", {}, ALL, HEADS),
    "llama-multiples-of-256": ("llama", {}, ALL, first("neurons", 768, 512, 256, 768)),
}
SURGEON_PLAIN = {f"{variant}-plain-{ratio}": (variant, ratio) for variant in ("llama", "qwen2") for ratio in (0.2, 0.5)}
QUICK = {"calibration.samples": 8, "calibration.sequence_length": 64, "evaluation.fidelity.sequence_length": 64}
QUICK |= {"prune.effort": "quick", "importance.dtype": "float32", "evaluation.dtype": "float32", "runtime.ranks": 1}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function: name -> its checkpoint, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")
    text = root / "text.txt"
    text.write_text(tiny_text(2000, seed=0))

    @functools.cache
    def dense(variant, **changes):
        folder = save_tiny(root / "-".join([variant, *changes]), variant, **SIZES | changes)
        tokenizer_that_merges("gpt-2", bos=False).save_pretrained(folder)
        return folder

    @functools.cache
    def make(name):
        if name in SURGEON_PLAIN:
            variant, ratio = SURGEON_PLAIN[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(root))
                return prune.prune(dense(variant), root / name, ratio, text=text, settings=QUICK)
        variant, changes, layers, units = BY_HAND[name]
        write(open_checkpoint(dense(variant, **changes)), Kept(layers, units), root / name)
        return root / name

    return make


@pytest.fixture(scope="module")
def checked():
    """A function: check a checkpoint in all engines that are there, at once. Forks of processes that have imported them
    answer: that takes longer than all else.
    """
    there, servers = [engine for engine in ENGINES if is_there(engine)], {}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # pytest shows the errors of a failing test
    for engine in there:
        servers[engine] = subprocess.Popen([python_of(engine), warm_engine.__file__, engine], text=True, **streams)

    def run(command, given=None, **options):
        _, _, engine, *files = command
        if not files:  # whether it is there
            return 0
        print(json.dumps([*files, given["TMPDIR"]]), file=servers[engine].stdin, flush=True)
        return int(servers[engine].stdout.readline())

    def check_all(checkpoint, exported=None):
        check._reference(checkpoint)
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda engine: check.check(checkpoint, {engine: "python"}, None, exported), there)
            checks = {engine: one for each in found for engine, one in each.items()}
        print(checkpoint.name, *(f"{engine}: {found.line()}" for engine, found in checks.items()), sep="\n")
        return checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_run", run)
        patch.setattr(check, "_reference", functools.cache(check._reference))
        yield check_all
    for server in servers.values():
        server.kill()
        server.wait()


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.mark.engine(*ENGINES)
@pytest.mark.parametrize("name", [*SURGEON_PLAIN, *BY_HAND])
def test_engines_compute_what_the_table_says_they_load(made, checked, name):
    config = read_json(made(name) / "config.json")
    checks = checked(made(name))
    assert {engine: not found.failure for engine, found in checks.items()} == {
        engine: fit(engine, config).loads for engine in checks
    }


@pytest.mark.engine("vllm", "mlx")
@pytest.mark.parametrize(
    ("name", "loading"), [("llama-any-widths", {"vllm"}), ("llama-multiples-of-256", {"vllm", "mlx"})]
)
def test_engines_load_layers_of_any_width_as_decilm(made, checked, name, loading, tmp_path):
    out = tmp_path / "decilm"
    export.export(made(name), out, None, "decilm")
    checks = checked(made(name), exported=out)
    assert {engine for engine, found in checks.items() if not found.failure} == loading & {*checks}
