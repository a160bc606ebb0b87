"""What calibration and refits move between ranks, and between a GPU and main memory, by formulas."""

from functools import partial

import pytest
import torch
from gather_counter import SMALL_PARAMETER, counting_gathers
from pretended_gpu import CPU, GPU, pretended_gpu
from ranks import SoloWorld, on_ranks
from refitting import KINDS, checkpoint_in, windows_of
from tiny import save_tiny
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.methods import CRITERIA
from hfprune_dist.scoring import accumulation
from hfprune_dist.scoring.accumulation import Accumulation, bytes_of
from hfprune_dist.scoring.shard_scorer import ShardScorer, summed_matrices

RANKS = (1, 2, 4)
FLOAT64 = 8


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("windows", [1, 3])
def test_a_micro_batch_sends_its_sums_to_the_host_and_gets_keys_of_signs(tmp_path, ranks, windows):
    checkpoint, used = checkpoint_in(tmp_path / "model"), [CRITERIA[name] for name in ("entropy", "surgeon")]
    kinds, world = [checkpoint.structures[kind] for kind in KINDS], SoloWorld(size=ranks, device=GPU)
    totals = Accumulation(ranks, tmp_path / "sums", world, summed_matrices(checkpoint, kinds, used))
    options = {"seed": 0, "world": world, "structures": KINDS, "totals": totals}
    with pretended_gpu() as gpu:
        scorer = ShardScorer(checkpoint, torch.bfloat16, windows_of(windows), used, **options)
        gpu.moved.clear()
        sums = scorer.score([range(windows)])
        assert {sum_N.device for sum_N in sums.values()} == {CPU}, "over gloo"
        assert {totals.matrix(name, 0).device for name in totals.matrices} == {GPU}, "over NCCL"
    # Of each layer and kind, the sums of both criteria, and one that tells whether activations are finite; two losses.
    numbers = sum(count * len(used) + 1 for units in kinds for count in units.counts) + len(used)
    assert gpu.moved == {"host": FLOAT64 * numbers, "GPU": FLOAT64 * windows}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stay", [False, True])
def test_hidden_states_wait_in_main_memory_or_move_once(tmp_path, ranks, stay):
    checkpoint, windows, tokens, layers = checkpoint_in(tmp_path / "model"), 8, 20, 3
    with pretended_gpu() as gpu:
        world = SoloWorld(size=ranks, device=GPU)
        stream = LayerStream(checkpoint, windows_of(windows, tokens=tokens), torch.bfloat16, 1, world, stay=stay)
        for _ in range(layers):
            stream.advance(lambda hidden_BTC: hidden_BTC + 1)
    states = windows // ranks * tokens * checkpoint.config["hidden_size"] * torch.bfloat16.itemsize
    assert gpu.moved == ({"GPU": states} if stay else {"GPU": layers * states, "host": layers * states})


class Counting:
    """A rank's world that counts the bytes of tensors in its collectives: over gloo, and, on GPUs, NCCL."""

    def __init__(self, world):
        self._world, self.bytes = world, {"broadcast_tensor": 0, "reduce": 0}

    def __getattr__(self, name):
        found = getattr(self._world, name)
        return partial(self._counted, name, found) if name in self.bytes else found

    def _counted(self, name, collective, tensor, rank):
        self.bytes[name] += tensor.nbytes
        collective(tensor, rank)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("fits", [True, False])
def test_ranks_exchange_sums_once_a_shard_and_matrices_once_a_save(tmp_path, monkeypatch, ranks, fits):
    shards, matrices, sums = 8, {"neurons": [(4, 4)] * 3, "up": [(6, 4)] * 3}, 10
    monkeypatch.setattr(accumulation, "BYTES_SAVED_A_ROUND", 1)
    monkeypatch.setattr(accumulation, "OWN_TERMS_BYTES", 2**20 if fits else 0)

    def work(world):
        world = Counting(world)
        totals = Accumulation(shards, tmp_path / "partial.safetensors", world, matrices)

        def score(_shard, counts):
            for name, sizes in matrices.items():
                for layer, size in enumerate(sizes):
                    totals.add_to_matrix(
                        name, layer, partial(torch.Tensor.add_, other=torch.ones(size)) if counts else None
                    )
            return {"loss": torch.ones(sums, dtype=torch.float64)}

        while not totals.is_complete:
            totals.add_round(score)
        return world.bytes

    times = 0 if ranks == 1 else 1 if fits else shards // ranks
    expected = {"broadcast_tensor": shards * sums * FLOAT64, "reduce": times * bytes_of(matrices)}
    assert Ranks(ranks).run(work) == [expected] * ranks


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_micro_batch_gathers_what_it_reads_once_forwards_and_once_backwards(tmp_path, ranks):
    """However many windows it has. DeepSpeed needs three to learn the order."""
    hidden, neurons, layers, vocabulary = 256, 416, 3, 512
    sizes = {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers}
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", dtype=torch.bfloat16, vocab_size=vocabulary, **sizes))
    assert hidden * hidden < SMALL_PARAMETER < hidden * neurons, "attention is whole everywhere"
    # The backward ends at the first layer's h: it doesn't need that layer's gate and up.
    weights = hidden * neurons * (3 * layers + 3 * layers - 2) + hidden * vocabulary * 2

    def count(world):
        options = {"seed": 0, "world": world, "sharding": "zero3"}
        scorer = ShardScorer(checkpoint, torch.bfloat16, windows_of(6), [CRITERIA["entropy"]], **options)
        for windows in (range(1), range(1, 2), range(2, 3), range(3, 4), range(4, 6)):
            with counting_gathers() as counts:
                scorer.score([windows])
        assert counts.bytes == torch.bfloat16.itemsize * weights, counts

    assert on_ranks(ranks, count) == [0] * ranks
