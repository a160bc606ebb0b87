"""The prune stage on mixtures of experts: it keeps the same number of neurons in every expert, or of experts in every
group, those that score highest.
"""

import json
import zlib

import pytest
import torch
from families import EXPERTS, save_model, with_experts
from made_stages import stage_of
from ranks import SoloWorld
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.stages import prune
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input
from hfprune_dist.structures import EXPERTS as WHOLE
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.score_names import score_name

RATIO = 0.15
BOTH = [NEURONS, KV_GROUPS]


def scored(store, checkpoint, structures):
    """Commit an importance artifact of random scores."""
    stage = stage_of("importance", "moe", {}, {})
    draft = store.handle(stage.id).open_draft()
    scores = {
        score_name(layer, "entropy", units.kind): torch.rand(count, generator=seeded(units.kind, layer)).double()
        for units in checkpoint.pruned_kinds(structures)
        for layer, count in enumerate(units.counts)
    }
    save_file(scores, draft / "importance.safetensors")
    windows_ST = torch.randint(3, 64, (16, 12), generator=seeded("windows", 0))
    save_file({"input_ids": windows_ST}, draft / "windows.safetensors")
    store.handle(stage.id).commit(stage, draft, {"metrics": {}})
    return stage, scores


def seeded(kind, layer):
    return torch.Generator().manual_seed(zlib.crc32(f"{kind} {layer}".encode()))


def pruned(store, ratio, inputs, refit, structures):
    """Run the stage and return it."""
    params = {"ratio": ratio, "criterion": "entropy", "allocation": "uniform", "floor": 0.2, "protect_first": 0}
    params |= {"protect_last": 0, "multiple_of": 1, "refit": refit}
    params |= {} if refit == "none" else {"dtype": "float32", "micro_batch_size": 2}
    params |= {} if structures == [NEURONS] else {"structures": structures}
    params |= {"allocation": "local"} if structures == BOTH else {}
    stage = stage_of("prune", "moe", params, inputs)
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    prune.run(Context(stage, store, SoloWorld(), RuntimeConfig(), Progress(None), {}, {}, 1))
    return stage


def assert_told_of_refit(kinds, metrics, refit):
    """Check the metrics of the refit for each layer that has such units."""
    for units in kinds:
        name = "refit" if units.kind == NEURONS else f"refit_{units.kind}"
        before, after = (metrics.get(f"{name}_error_{it}") for it in ("before", "after"))
        assert (before is None) == (refit == "none")
        for layer, count in enumerate(units.counts if before else ()):
            assert after[layer] < before[layer] if count else after[layer] is before[layer] is None


@pytest.mark.parametrize(
    ("model_type", "refit", "structures"),
    [
        *((name, "none", [structure]) for name in EXPERTS for structure in (NEURONS, WHOLE)),
        ("gpt_oss", "dense", [NEURONS]),
        ("qwen2_moe", "dense", BOTH),
        ("granitemoe", "none", BOTH),
    ],
)
def test_what_scores_highest_stays(tmp_path, model_type, refit, structures):
    changes = with_experts(model_type, 12) if structures == [WHOLE] else {}
    changes |= {"num_attention_heads": 8, "num_key_value_heads": 4} if structures == BOTH else {}
    store, folder = Store(tmp_path / "store"), save_model(tmp_path / "model", model_type, **changes)
    dense = open_checkpoint(folder)
    importance, scores = scored(store, dense, structures)
    inputs = {"model": Input(FileHashes(None).of_folder(folder), str(folder)), "importance": importance.as_input()}
    stage = pruned(store, RATIO, inputs, refit, structures)
    kept, metrics = (
        json.loads((store.path(stage.id) / "kept.json").read_text()),
        store.handle(stage.id).manifest()["metrics"],
    )
    model = AutoModelForCausalLM.from_pretrained(store.path(stage.id))
    assert metrics["parameters"] == sum(it.numel() for it in model.state_dict().values())
    assert metrics["ratio_reached"] >= RATIO
    kinds = dense.pruned_kinds(structures)
    assert_told_of_refit(kinds, metrics, refit)
    for units in kinds:
        for layer, rows in enumerate(kept[units.kind]):
            scores_EN = scores[score_name(layer, "entropy", units.kind)].view(units.parts, -1)
            count, width = len(rows) // units.parts, scores_EN.shape[1]
            best = [row.topk(count).indices.sort().values + width * it for it, row in enumerate(scores_EN)]
            assert rows == torch.cat(best).tolist()
            for field in units.fields if rows else ():
                assert getattr(model.config, field) == metrics[field] == len(rows) // units.copies * units.fields[field]
