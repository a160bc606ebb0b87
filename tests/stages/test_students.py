"""Importance in two passes: one chooses a student, the other scores in it; on any ranks, after a death at any point."""

from dataclasses import dataclass

import pytest
import torch
from core_definition import coupled_taylor
from damage import nothing_reaches_the_disk
from faults.kill import deaths_during
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_stages import stage_of
from safetensors.torch import load_file
from tiny import VARIANTS, importance_stage, save_tiny, tiny_model, write_documents
from worlds import Death, Ranks, run_in_threads, without_deepspeed

from hfprune_dist.methods.sdmprune import student_keeps
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures.score_names import SCORES, scores_of_layers

OF_LABELS, DISTILLED = "coupled_taylor", "coupled_taylor_distilled"
TAUGHT = {"lacks": 0.1, "teacher_share": 0.42, "teacher_temperature": 0.5}
# DeepSpeed shards only parameters with more than 100,000 elements: here, the MLPs' weights.
SHARDED = {"hidden_size": 256, "intermediate_size": 416, "num_hidden_layers": 3}


@dataclass(frozen=True)
class Passes:
    """Both stages over a folder's model and text."""

    first: Stage
    second: Stage

    @classmethod
    def over(cls, folder, variant="llama", structures=None, shape=None, **calibration):
        save_tiny(folder / "model", variant, **(shape or {}))
        write_documents(folder / "text.jsonl")
        given_settings = {"samples": 5, "sequence_length": 16, "micro_batch_size": 1, "shard_size": 1}
        params = {"calibration": {**given_settings, "text_field": "text", **calibration}, "dtype": "float32"}
        params |= {"add_bos_token": True, "seed": 3}
        several = {"structures": structures} if structures else {}
        first = importance_stage(folder, "first", {**params, **several, "criteria": [OF_LABELS, "entropy"]})
        second = importance_stage(folder, "second", {**params, "criteria": [DISTILLED], "student": TAUGHT})
        second = stage_of(second.kind, second.label, second.params, {**second.inputs, "student": first.as_input()})
        return cls(first, second)

    def run(self, store, run_one):
        """Run both; return their scores by name, and their files' bytes."""
        for stage in (self.first, self.second):
            if not store.handle(stage.id).is_committed():
                run_one(store, stage)
        files = [store.path(stage.id) / SCORES for stage in (self.first, self.second)]
        return [load_file(file) for file in files], [file.read_bytes() for file in files]


def in_threads(size, deaths=None, logs=None):
    """Return a function that runs a stage; by stage, ``deaths`` says how ranks die and ``logs`` gets their logs."""

    def run_one(store, stage):
        ranks = Ranks(size, deaths=(deaths or {}).get(stage.id))
        run_in_threads(store, stage, ranks)
        if logs is not None:
            logs[stage.id] = ranks.logs

    return run_one


def assert_as_defined(store, passes, scores, variant, shape=None):
    model = tiny_model(variant, **(shape or {}))
    windows = load_file(store.path(passes.second.id) / "windows.safetensors")["input_ids"]
    first, second = (
        torch.stack(scores_of_layers(each, name, "neurons"))
        for each, name in zip(scores, (OF_LABELS, DISTILLED), strict=True)
    )
    expected = coupled_taylor(model, windows)
    assert (first - expected).norm() < 1e-4 * expected.norm()
    keeps = torch.stack([student_keeps(scores_U, TAUGHT["lacks"]) for scores_U in first])
    expected = coupled_taylor(model, windows, keeps, TAUGHT["teacher_share"], TAUGHT["teacher_temperature"])
    assert (second - expected).norm() < 1e-4 * expected.norm()
    assert not second[~keeps].any() and second[keeps].min() > 0


class TestInThreads:
    @pytest.fixture(scope="class", autouse=True)
    def patch(self):
        with pytest.MonkeyPatch.context() as patch, nothing_reaches_the_disk():
            without_deepspeed(patch)
            yield patch

    @settings(max_examples=12)
    @example(variant="llama", calibration={"samples": 1}, groups=True, size=3, later=1, dies_at=0.9)
    @given(
        variant=st.sampled_from(sorted(VARIANTS)),
        calibration=st.fixed_dictionaries(
            {"samples": st.integers(1, 6), "micro_batch_size": st.integers(1, 3), "shard_size": st.integers(1, 2)}
        ),
        groups=st.booleans(),
        size=st.integers(1, 4),
        later=st.integers(1, 4),
        dies_at=st.floats(0, 0.999),
    )
    def test_scores_are_as_defined_on_any_ranks_after_any_death(
        self, tmp_path_factory, variant, calibration, groups, size, later, dies_at
    ):
        folder = tmp_path_factory.mktemp("passes")
        structures = ["neurons", "kv_groups"] if groups else None
        passes, store = Passes.over(folder, variant, structures, **calibration), Store(folder / "one")
        scores, files = passes.run(store, in_threads(1))
        assert_as_defined(store, passes, scores, variant)

        logs = {}
        assert passes.run(Store(folder / "many"), in_threads(size, logs=logs))[1] == files
        killed, victim = Store(folder / "killed"), size - 1
        deaths = {passes.second.id: {victim: int(dies_at * len(logs[passes.second.id][victim]))}}
        with pytest.raises(Death):
            passes.run(killed, in_threads(size, deaths))
        assert passes.run(killed, in_threads(later))[1] == files

    @pytest.mark.parametrize("later", [1, 2])
    def test_death_before_any_file_appears_ends_with_the_same_bits(self, tmp_path, later):
        passes, store, copies = Passes.over(tmp_path, samples=3), Store(tmp_path / "store"), tmp_path / "copies"
        in_threads(1)(store, passes.first)
        second = passes.second
        deaths = deaths_during(lambda: in_threads(1)(store, second), store.root, copies, ("rename", "replace"))
        _, files = passes.run(store, in_threads(1))
        unfinished = [it for it in map(Store, deaths) if not it.handle(second.id).is_committed()]
        assert len(unfinished) >= 3 * 2, "before the state of each shard, and the artifact's files"
        for state in unfinished:
            assert passes.run(state, in_threads(later))[1] == files
