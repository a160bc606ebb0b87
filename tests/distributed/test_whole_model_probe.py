"""Passes through single layers are compared with the whole model and refuse architectures they don't reproduce."""

from dataclasses import replace

import pytest
import tiny
import torch
from forks import on_ranks
from made_stages import stage_of
from pairs import change_families
from ranks import SoloWorld
from safetensors.torch import load_file, save_file
from scoring import LAYERS, files_of, make_stage, run
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from hfprune_dist.checkpoints import families as families_module
from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.tensor_files import save_tensors
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed import whole_model_probe as probes
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.whole_model_probe import PROBE, obtain_probe
from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.stages import prune, reference
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

IMPORTANCE = stage_of("importance", "tiny", {}, {})
# The first one's attention depends on its layer's number, which a single layer hides; the other poses as a Llama.
ADDED = {
    "diffllama": (DiffLlamaConfig, DiffLlamaForCausalLM, {"tie_word_embeddings": False}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"tie_word_embeddings": False}),
}
OLMO2 = {"attention_norm": "post_feedforward_layernorm", "attention_norm_after": None}
OLMO2 |= {"mlp_norm": "post_attention_layernorm", "mlp_norm_after": None, "whole_groups": ""}
DEPARTURES = {"diffllama": "outputs of layer 1 depart"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def families(monkeypatch):
    change_families(monkeypatch, lambda it: replace(it, **OLMO2) if it.model_type == "olmo2" else it)
    monkeypatch.delitem(families_module._UNFIT, "diffllama")  # as if this weren't known yet
    for name, variant in ADDED.items():
        monkeypatch.setitem(tiny.VARIANTS, name, variant)


def prepare(folder, variant, **params):
    """Return a store with scores and windows but no probe, as an earlier version left it, and a stage on them."""
    store, dtype = Store(folder / "store"), params.pop("dtype", "float32")
    draft = store.open_draft(IMPORTANCE.id)
    generator = torch.Generator().manual_seed(0)
    scores = {f"layers.{it}.entropy": torch.rand(48, generator=generator, dtype=torch.float64) for it in range(LAYERS)}
    save_file(scores, draft / "importance.safetensors")
    save_file({"input_ids": torch.randint(3, 264, (9, 40), generator=generator)}, draft / "windows.safetensors")
    store.commit(IMPORTANCE, draft, {"metrics": {}})
    model = tiny.save_tiny(folder / "model", variant, num_hidden_layers=LAYERS)
    inputs = {"model": Input(FileHashes(None).of_folder(model), str(model)), "importance": IMPORTANCE.as_input()}
    settings = {"dtype": dtype, "micro_batch_size": 2}
    if params:
        method = {"ratio": 0.2, "criterion": "entropy", "multiple_of": 1, "allocation": "uniform"}
        limits = {"floor": 0.2, "protect_first": 0, "protect_last": 0}
        return store, stage_of("prune", "tiny", {**method, **limits, **settings, **params}, inputs)
    return store, stage_of("reference", "tiny", settings, inputs)


def run_alone(store, stage):
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    module = {"prune": prune, "reference": reference}[stage.kind]
    module.run(Context(stage, store, SoloWorld(), RuntimeConfig(), Progress(None), {}, {}, 1))


def windows_of(store):
    return load_file(store.path(IMPORTANCE.id) / "windows.safetensors")["input_ids"]


PASSES = [
    {"refit": "dense"},
    {"refit": "layerwise"},
    {"refit": "none", "allocation": "searched"},
    {"refit": "dense", "allocation": "searched"},
    {},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", PASSES, ids=str)
@pytest.mark.parametrize("variant", DEPARTURES)
def test_what_layers_alone_dont_reproduce_is_refused_with_its_place(tmp_path, variant, method, dtype):
    store, stage = prepare(tmp_path, variant, dtype=dtype, **method)
    with pytest.raises(UserError, match=f"{variant}: .* {DEPARTURES[variant]} from the whole model's by"):
        run_alone(store, stage)
    assert not store.path(stage.id).exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_after_the_mlp_is_refused_by_refits_of_whole_layers_before_they_fit_anything(
    tmp_path, monkeypatch, dtype
):
    """Their targets are what the residual stream lacks; other passes reproduce such a model."""
    monkeypatch.setattr(SequentialRefit, "_fit", lambda *_: pytest.fail("fitted"))
    for method in ({"refit": "layerwise"}, {"refit": "block"}):
        (tmp_path / method["refit"]).mkdir()
        store, stage = prepare(tmp_path / method["refit"], "olmo2", dtype=dtype, **method)
        with pytest.raises(UserError, match=r"olmo2: in layer 0, the inputs of post_attention_layernorm plus"):
            run_alone(store, stage)
    for number, method in enumerate(({"refit": "dense"}, {})):
        (tmp_path / str(number)).mkdir()
        run_alone(*prepare(tmp_path / str(number), "olmo2", dtype=dtype, **method))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["llama", "llama-tied-biases", "mistral", "qwen2", "qwen3"])
def test_every_family_is_reproduced_bit_for_bit(tmp_path, variant, dtype):
    """Exactly where micro-batches have the same shape; otherwise up to rounding."""
    store, _ = prepare(tmp_path, variant, dtype=dtype)
    checkpoint, windows_ST = open_checkpoint(tmp_path / "model"), windows_of(store)
    for size, exact in ((2, True), (3, False)):
        probe = obtain_probe(checkpoint, windows_ST, DTYPES[dtype], 2, SoloWorld(), saved=None, sharding="auto")
        stream, halting = (
            LayerStream(checkpoint, windows_ST, DTYPES[dtype], size, SoloWorld(), probe=probe) for _ in range(2)
        )
        blocks = [checkpoint.structures[kind] for kind in ("kv_groups", "neurons")]
        for number, layer in stream.layers(range(LAYERS)):
            stream.require_residual(layer, blocks)
            stream.advance(layer)
            halting.advance_to(layer, checkpoint.units)
            assert not torch.equal(halting.all_hidden()[0], stream.all_hidden()[0])
            halting.advance_from(layer, checkpoint.units)
            assert all(
                torch.equal(*pair) for pair in zip(*(it.all_hidden().values() for it in (stream, halting)), strict=True)
            )
            assert not exact or probe.error(number + 1, stream.all_hidden()[0][0]) == 0
        assert len(list(stream.final_hidden())) == -(-9 // size)


@pytest.mark.parametrize("place", range(LAYERS + 2))
def test_a_departure_is_found_at_every_place(tmp_path, place):
    store, _ = prepare(tmp_path, "llama")
    where = open_checkpoint(tmp_path / "model"), windows_of(store), torch.float32, 2, SoloWorld()
    probe = obtain_probe(*where, saved=None, sharding="auto")
    probe.states_LPC[place] *= 1.001
    names = ["embeddings", *(f"outputs of layer {number}" for number in range(LAYERS)), "final norm's outputs"]
    with pytest.raises(UserError, match=f"{names[place]} depart"):
        stream = LayerStream(*where, probe=probe)
        for _, layer in stream.layers(range(LAYERS)):
            stream.advance(layer)
        list(stream.final_hidden())


def test_the_calibration_pass_leaves_the_probe_of_the_whole_model(tmp_path):
    """The probe is the same on any number of ranks."""
    stage, stores = make_stage(tmp_path, "qwen2"), [Store(tmp_path / str(ranks)) for ranks in (1, 2)]
    for ranks, store in enumerate(stores, 1):
        assert on_ranks(ranks, lambda world, store=store: run(store, stage, world)).codes == [0] * ranks
    assert files_of(stores[0], stage) == files_of(stores[1], stage)
    saved = load_file(stores[0].path(stage.id) / PROBE)
    windows_ST = load_file(stores[0].path(stage.id) / "windows.safetensors")["input_ids"]
    assert torch.equal(saved["input_ids"], windows_ST[0])
    model = load_causal_lm(tmp_path / "model", torch.float32)
    with torch.no_grad():
        states = model.model(windows_ST[:1], output_hidden_states=True).hidden_states
    assert len(saved["hidden_states"]) == LAYERS + 2
    for place in range(LAYERS):  # transformers shows the last layer's outputs only after the norm
        torch.testing.assert_close(saved["hidden_states"][place], states[place][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved["hidden_states"][-1], states[-1][0], rtol=1e-4, atol=1e-5)


def test_a_model_is_loaded_where_no_probe_of_it_was_left(tmp_path, monkeypatch):
    loads = []
    original = probes.FrozenModel
    monkeypatch.setattr(probes, "FrozenModel", lambda *rest: loads.append(rest) or original(*rest))
    store, _ = prepare(tmp_path, "llama")
    windows_ST, file = windows_of(store), tmp_path / PROBE
    checkpoint = open_checkpoint(tmp_path / "model")

    def obtain(windows_ST=windows_ST, dtype=torch.float32):
        probe = obtain_probe(checkpoint, windows_ST, dtype, 2, SoloWorld(), saved=file, sharding="auto")
        assert probe.row_in(windows_ST) is not None and probe.states_LPC.dtype == dtype
        return probe

    made = obtain()
    assert len(loads) == 1
    save_tensors({"input_ids": made.window_T, "hidden_states": made.states_LPC}, file)
    assert torch.equal(obtain().states_LPC, made.states_LPC) and len(loads) == 1
    obtain(windows_ST=windows_ST[1:])
    obtain(dtype=torch.bfloat16)
    file.write_bytes(file.read_bytes()[:-7])
    obtain()
    assert len(loads) == 4


def test_a_probe_is_the_same_wherever_the_whole_model_is_placed(tmp_path):
    store, _ = prepare(tmp_path, "llama")
    where = open_checkpoint(tmp_path / "model"), windows_of(store), torch.bfloat16, 2

    def compare(world):
        sharded, whole = (obtain_probe(*where, world, saved=None, sharding=it) for it in ("zero3", "replicate"))
        assert torch.equal(sharded.states_LPC, whole.states_LPC)

    assert on_ranks(2, compare).codes == [0, 0]
