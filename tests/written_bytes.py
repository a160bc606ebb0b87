"""Record what pruning writes, and compare it with what another version of the code writes.

``python tests/written_bytes.py FILE`` writes the hashes of all files that cuts of tiny random models leave, for every
family, and of those of a sweep with every method; if FILE is there, it tells which hashes are others now.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import families_masked
import mixtures
import torch
from checkpoints.test_experts import FUSED, SHARES, as_modules_have_it
from families import FAMILIES, MIXTURES, SEEING, save_model, with_experts
from masking import write
from sweeps import finish, make_inputs
from tiny import VARIANTS, save_tiny

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.planning.remarks import sizes_of
from hfprune_dist.store.atomic_files import read_json
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.structures import EXPERTS, NEURONS

METHODS = sorted(file.stem for file in Path(__file__).parents[1].glob("configs/methods/*.yaml"))
OF_EXPERTS = ["hfprune", "hfprune-experts", "reap", "fisher-refit", "magnitude"]


def cuts_of(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, families_masked.Kept]]:
    """Yield what stays of a family's model in each of its cuts."""
    if checkpoint.family.experts is None:
        yield "plain", families_masked.some_kept(checkpoint, families_masked.two_layers(checkpoint), (15, 15))
        if name not in SEEING:
            yield "differing", families_masked.some_kept(checkpoint, (1, 2), (9, 20))
        return
    yield "whole", mixtures.some_kept(checkpoint, SHARES[EXPERTS][0], EXPERTS)
    yield "neurons", mixtures.some_kept(checkpoint, SHARES[NEURONS][0], groups=not checkpoint.family.whole_groups)


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Make a model of each family, also with all experts of a layer in one tensor, sharded, and with tied heads."""
    for name in FAMILIES | SEEING:
        yield name, save_model(folder / name, name)
    for name in MIXTURES:
        yield name, save_model(folder / name, name, **MIXTURES[name] | with_experts(name, 8))
        if name in FUSED:
            yield f"{name} fused", as_modules_have_it(open_checkpoint(folder / name), folder / f"{name} fused").path
    for name in VARIANTS:
        yield f"tiny {name}", save_tiny(folder / f"tiny {name}", name, num_hidden_layers=3, shard_size="20KB")


def hashes_in(folder: Path, *left_out: str) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in left_out]
    return {str(file.relative_to(folder)): FileHashes(None).of_file(file) for file in files}


def of_cuts(folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the hashes of every cut, and of a second one of what the first has left; and sizes and parameters."""
    for name, path in models(folder):
        dense = open_checkpoint(path)
        for what, kept in cuts_of(dense, name.partition(" ")[0]):
            write(dense, kept, folder / "once")
            smaller = open_checkpoint(folder / "once")
            parameters = smaller.parameters, dense.parameter_counts.after(kept.shape), smaller.parameters_per_unit
            told = {"parameters": parameters, "sizes": sizes_of(dense, [kept.shape])}
            yield f"{name}, {what}", hashes_in(folder / "once") | told
            if what != "plain":
                again = families_masked.Kept((0, 1), {NEURONS: [torch.arange(7)] * 2})
                if dense.family.experts is not None:
                    other = NEURONS if what == "whole" else EXPERTS
                    again = mixtures.some_kept(smaller, 1 / 2, other)
                write(smaller, again, folder / "twice")
                yield f"{name}, {what}, twice", hashes_in(folder / "twice")
                shutil.rmtree(folder / "twice")
            shutil.rmtree(folder / "once")


def of_sweep(folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the hashes of all that stages leave, of every method."""
    config = make_inputs(folder)
    save_tiny(folder / "alpha", num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)
    save_model(folder / "beta", "glm4_moe", vocab_size=264, max_position_embeddings=512, n_routed_experts=6)
    given = "--ratios", "0.2", "--ranks", "1", "--set", "evaluation.tasks=[]", "--set", "recovery.max_steps=2"
    for model, methods in ("alpha", METHODS), ("beta", OF_EXPERTS):
        chosen = [name for name in methods if model == "beta" or name not in ("hfprune-experts", "reap")]
        finish(config, folder / "out", "--models", model, "--methods", ",".join(chosen), *given)
        for stage in read_json(folder / "out" / "sweep.json")["stages"]:
            made = folder / "out" / "store" / stage["kind"] / stage["fingerprint"]
            sizes = read_json(made / "manifest.json")["metrics"] if stage["kind"] in ("prune", "loraprune") else {}
            yield (
                f"{stage['kind']} {stage['label']}",
                hashes_in(made, "manifest.json", "kept.json") | {"metrics": sizes},
            )


def main(file: Path) -> int:
    found: dict[str, object] = {}
    for part in (of_cuts, of_sweep):
        with tempfile.TemporaryDirectory() as folder:
            found |= part(Path(folder))
    if not file.exists():
        file.write_text(json.dumps(found, indent=1, sort_keys=True))
        return 0
    found, before = json.loads(json.dumps(found)), json.loads(file.read_text())
    others = [name for name in sorted(found.keys() | before.keys()) if found.get(name) != before.get(name)]
    print(f"{len(found)} results, {len(others)} of them others than in {file}", *others, sep="\n")
    return len(others)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1])) > 0)
