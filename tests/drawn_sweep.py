"""A finished sweep of any size with drawn results: the manifests and small files that a report reads."""

import json
import random
from pathlib import Path

from made_stages import stage_of
from rows import efficiency

from hfprune_dist.planning.plan import Cell, Plan, label_of
from hfprune_dist.report import page
from hfprune_dist.results.rows import DenseModel, Row, collect_rows
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import End, Ledger, local_log
from hfprune_dist.store.stage import Input, Stage

LAYERS, WIDTH, STEPS = 4, 48, 12
BEGIN = 1_800_000_000.0


class DrawnSweep:
    """Models x methods x ratios, with and without recovery, and dense ones; rows ``missing`` have no evaluation."""

    def __init__(self, out: Path, models=("m",), methods=("hfprune", "other"), ratios=(0.2, 0.5), **settings):
        self.out, self.methods, self.ratios = out, methods, ratios
        self.tasks = settings.get("tasks", ("piqa",))
        self.timed = settings.get("timed", False)
        self.missing = set(settings.get("missing", ()))
        self._random = random.Random(0)
        self._stages: dict[str, Stage] = {}
        self._cells: list[Cell] = []
        self._now = BEGIN
        out.mkdir(parents=True, exist_ok=True)
        for model in models:
            self._add_model(model)
        self.plan = Plan(self._stages, tuple(self._cells))
        self.dense = {model: DenseModel(1000, {"intermediate_size": WIDTH}) for model in models}

    def rows(self) -> list[Row]:
        return collect_rows(self.plan, Store(self.out / "store"), self.dense)

    def page(self, rows=None) -> str:
        return page.page(self.out, self.plan, rows or self.rows(), self._now)

    def fail(self, message: str) -> None:
        """Record a failed attempt at each stage, with its log."""
        (self.out / "logs").mkdir()
        for stage in self._stages.values():
            attempt = Ledger(Store(self.out / "store")).begin(stage)
            attempt.close(End("input", message, BEGIN + 9))
            local_log(self.out / "logs", attempt.intent).touch()

    def _add_model(self, model):
        dense = Input(f"digest of {model}", f"/{model}")
        scored = self._stage("importance", model, {"model": dense})
        self._add_cells((model, dense), None, None, (), dense)
        for method in self.methods:
            for ratio in self.ratios:
                inputs = {"model": dense, "importance": scored.as_input()}
                label = label_of(model, ratio, method, "none")
                sizes = {"intermediate_size": round((1 - ratio) * WIDTH), "parameters": round((1 - ratio) * 1000)}
                pruned = self._stage("prune", label, inputs, ratio_reached=ratio + 0.001, **sizes)
                self._write(pruned, "kept.json", json.dumps(self._kept(sizes["intermediate_size"])))
                self._add_cells((model, dense), ratio, method, (scored.id, pruned.id), pruned.as_input())

    def _add_cells(self, named, ratio, method, producers, checkpoint):
        model, dense = named
        label = label_of(model, ratio, method, "none")
        efficiency = {"model": checkpoint, "dense": dense}
        timed = self._stage("efficiency", label, efficiency, **self._efficiency(ratio)).id if self.timed else None
        recovered = self._stage("recover", label_of(model, ratio, method, "lora"), {"model": checkpoint})
        losses = [{"step": step, "loss": 3 / step} for step in range(1, STEPS)]
        self._write(recovered, "loss.jsonl", "".join(json.dumps(line) + "\n" for line in losses))
        for recovery, made, model_input in (
            ("none", producers, checkpoint),
            ("lora", (*producers, recovered.id), recovered.as_input()),
        ):
            label = label_of(model, ratio, method, recovery)
            scores = {"fidelity": self._fidelity(), "other_texts": {"papers": self._fidelity()}, "tasks": self._tasks()}
            inputs = {"model": model_input, "dense": dense}
            evaluated = self._stage("evaluate", label, inputs, made=label not in self.missing, **scores)
            self._cells.append(Cell(label, model, ratio, method, "entropy", recovery, made, evaluated.id, timed))

    def _stage(self, kind, label, inputs, made=True, **metrics):
        stage = stage_of(kind, label, {"number": len(self._stages)}, inputs)
        self._stages[stage.id] = stage
        if made:
            times = {"started": self._now, "finished": self._now + 60, "wall_time_s": 60.0, "world_size": 1}
            origin = {"provenance": {"git_commit": "c0ffee", "packages": {"torch": "2"}}, "config": {"seed": 0}}
            self._write(stage, "manifest.json", json.dumps({"files": {}, "metrics": metrics, **times, **origin}))
        self._now += 60
        return stage

    def _write(self, stage, name, text):
        file = self.out / "store" / stage.id / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def _fidelity(self):
        return {"perplexity": 10 + self._random.random(), "kl": self._random.random(), "top1_agreement": 0.5}

    def _efficiency(self, ratio):
        factor = 1 / (1 - (ratio or 0.0))
        return efficiency(factor, tokens_per_s=100 * factor, seconds=0.5 / factor)

    def _tasks(self):
        return {task: {"acc": self._random.random(), "acc_stderr": 0.01} for task in self.tasks}

    def _kept(self, width):
        neurons = [sorted(self._random.sample(range(WIDTH), width)) for _ in range(LAYERS)]
        return {"layers": list(range(LAYERS)), "neurons": neurons}
