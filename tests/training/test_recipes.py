"""Every recipe against a plain loop, on any number of ranks, interrupted and not."""

import gc
import itertools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from fine_tunings import ROWS, STEPS, TOKENS, make_task, train
from peft.tuners.lora import Linear
from pretended_gpu import GPU, pretended_gpu
from ranks import Interrupting, SoloWorld
from shapes import divergence
from tiny import save_tiny
from torch.nn.functional import cross_entropy, kl_div
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import Placement
from hfprune_dist.models import memory_efficient_backward
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.models.memory_efficient_backward import replace_norms
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.training import trainer
from hfprune_dist.training.teacher_states import DENSE
from hfprune_dist.training.trainer import add_lora, fine_tune, parts_to_train

RECIPES = {
    "lora, labels": {"method": "lora"},
    "lora, distill": {"method": "lora", "objective": "distill"},
    "full, labels": {"method": "full", "weight_decay": 5.0},
    "full, distill": {"method": "full", "objective": "distill"},
    "full, both": {"method": "full", "objective": 0.25},
    "parts, labels": {"method": "parts", "parts": ["lm_head", "last_1_layers"]},
    "parts, distill": {"method": "parts", "parts": ["norms", "embeddings"], "objective": "distill"},
}
USUAL = {"dtype": "float32", "dropout": 0.0, "warmup_steps": 1}


def make_checkpoints(folder, **sizes):
    """A model, and another one as its teacher, with the same head."""
    teacher = open_checkpoint(save_tiny(folder / "teacher", "llama-tied-biases", **sizes))
    model = load_causal_lm(teacher.path, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(torch.rand_like(layer.mlp.up_proj.weight))
    model.save_pretrained(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / file).write_bytes((teacher.path / file).read_bytes())
    return open_checkpoint(folder / "model"), teacher


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("models"))


def task_of(checkpoints, name, *, online=True, **settings):
    checkpoint, teacher = checkpoints
    task = make_task(checkpoint, **{**USUAL, **RECIPES[name], **settings})
    if not task.settings.teacher_share:
        return task
    if online:
        return replace(task, teacher=teacher)
    with torch.no_grad():
        ids_ST = torch.stack([task.rows(row)["input_ids"] for row in range(ROWS)])
        dense_STC = load_causal_lm(teacher.path, torch.float32).model(input_ids=ids_ST).last_hidden_state
    return replace(task, rows=lambda row: {**task.rows(row), DENSE: dense_STC[row]})


def plain_losses(task, teacher):
    """The losses of a loop in one process, with logits of all tokens, one optimizer state for each parameter."""
    model, settings = load_causal_lm(task.checkpoint.path, torch.float32), task.settings
    model.requires_grad_(False)
    trained = (add_lora if settings.method == "lora" else parts_to_train)(model, task)
    dense = load_causal_lm(teacher.path, torch.float32)
    groups = [{"params": [it for it in trained.values() if (it.ndim == 1) == flat]} for flat in (False, True)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = settings.weight_decay, 0.0  # none of norms and biases
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    losses = []
    for step in range(task.total_steps):
        ids_ST = torch.stack([task.rows(row)["input_ids"] for row in task.schedule.rows_of(step)])
        logits_NV, targets_N = model(input_ids=ids_ST).logits[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten()
        with torch.no_grad():
            dense_NV = dense(input_ids=ids_ST).logits[:, :-1].flatten(0, 1)
        logs = (each_NV.log_softmax(-1) for each_NV in (logits_NV, dense_NV))
        divergence, share = kl_div(*logs, log_target=True, reduction="batchmean"), settings.teacher_share
        loss = share * divergence + (1 - share) * cross_entropy(logits_NV, targets_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_alone(task, folder, **runtime):
    given = Progress(None), Interruption(), folder / "snapshot", folder / "run"
    return fine_tune(task, SoloWorld(), RuntimeConfig(**runtime), *given)


@pytest.mark.parametrize(("name", "online"), [*((name, True) for name in RECIPES), ("full, distill", False)])
def test_the_first_steps_are_those_of_a_plain_loop(tmp_path, checkpoints, name, online):
    """The dense model runs beside the model, or its hidden states come from a file."""
    task = task_of(checkpoints, name, online=online, micro_batch_size=3)
    losses = [line["loss"] for line in train_alone(task, tmp_path).losses]
    assert losses == pytest.approx(plain_losses(task, checkpoints[1]), rel=1e-5) and losses[-1] < losses[0]


def test_a_head_alone_learns_from_steps_that_differ_by_a_row(tmp_path):
    """Of the shorter ones, one micro-batch has no tokens to learn from."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    task = make_task(checkpoint, **USUAL, method="parts", parts=["lm_head"], objective=0.5, micro_batch_size=1)
    task = replace(task, teacher=checkpoint, schedule=Schedule(5, 2, 0))
    losses = [line["loss"] for line in train_alone(task, tmp_path).losses]
    assert len({len(task.schedule.rows_of(step)) for step in range(task.total_steps)}) == 2
    assert losses == pytest.approx(plain_losses(task, checkpoint), rel=1e-5)


def test_a_head_that_an_earlier_round_has_trained_is_not_the_dense_models(tmp_path, checkpoints):
    model = load_causal_lm(checkpoints[0].path, torch.float32)
    torch.nn.init.normal_(model.lm_head.weight)
    shutil.copytree(checkpoints[0].path, tmp_path / "trained")
    model.save_pretrained(tmp_path / "trained")
    trained_before = open_checkpoint(tmp_path / "trained"), checkpoints[1]
    task = task_of(trained_before, "full, distill", evaluate_every=1)
    task = replace(task, head_of=checkpoints[1], held_out=HeldOut(checkpoints[1]))
    trained = train_alone(task, tmp_path)
    assert [line["loss"] for line in trained.losses] == pytest.approx(plain_losses(task, checkpoints[1]), rel=1e-5)
    assert trained.losses[0]["untrained_kl"] == pytest.approx(task.held_out.divergence(model), rel=1e-4)


def test_a_warm_up_takes_at_most_a_quarter_of_the_steps(checkpoints):
    task = task_of(checkpoints, "lora, labels", warmup_steps=4)
    rates = [replace(task, total_steps=steps).learning_rate(0) for steps in (1, 3, 4)]
    assert rates[0] == rates[1] == task.settings.learning_rate and rates[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full, both", "parts, labels"])
def test_ranks_share_the_optimizer_and_resume_as_more_or_fewer(tmp_path, checkpoints, name, monkeypatch):
    """On two ranks, the teacher runs sharded, however small it is; on one, from a snapshot of two, whole."""
    initialize = deepspeed.initialize

    def shard_all(model, config):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(model=model, config=config)

    monkeypatch.setattr(deepspeed, "initialize", shard_all)
    task = task_of(checkpoints, name)
    alone, _ = train(tmp_path / "one", 1, task)
    together, gathered = train(tmp_path / "two", 2, task)
    assert len(together.shares) == 2 and len(alone.shares) == 1
    assert (0 < gathered[0] < gathered[1] < gathered[2]) == (name == "full, both"), gathered
    monkeypatch.setattr("fine_tunings.Interruption", lambda: Interrupting(2))
    with pytest.raises(AssertionError):
        train(tmp_path / "resumed", 2, task)
    monkeypatch.undo()
    resumed, counts = train(tmp_path / "resumed", 1, task)
    assert len(counts) == STEPS - 2, "a count for each step"
    for other in (together, resumed):
        for key in ("loss", "grad_norm"):
            values, expected = ([line[key] for line in each.losses] for each in (other, alone))
            assert values == pytest.approx(expected, rel=1e-5), key
        for key, weight in alone.weights.items():
            torch.testing.assert_close(other.weights[key], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora, labels", "lora, distill"])
def test_models_sharded_or_checkpointed_learn_what_whole_ones_do(tmp_path, name, monkeypatch):
    """Evaluations on the way come between forwards whose order DeepSpeed has learnt. MLPs are large enough to shard."""
    checkpoints = make_checkpoints(tmp_path, hidden_size=256, intermediate_size=416)
    task = task_of(checkpoints, name, dropout=0.1, evaluate_every=1)
    task = replace(task, held_out=HeldOut(checkpoints[1]))
    alone, _ = train(tmp_path / "one", 1, task)
    for whole in (False, True):
        placement = Placement(whole, checkpointing=whole, fits=True)
        monkeypatch.setattr(trainer, "placement_here", lambda *_, placement=placement: placement)
        found, counts = train(tmp_path / str(whole), 2, task)
        assert (0 < counts[0] < counts[1] < counts[2]) != whole, "sharded weights are gathered in each step"
        for key in ("loss", "grad_norm", "held_out_kl", "held_out_perplexity"):
            values, expected = ([line[key] for line in each.losses] for each in (found, alone))
            assert values == pytest.approx(expected, rel=1e-4), key


class HeldOut:
    """Windows with a teacher's hidden states."""

    def __init__(self, teacher):
        self.windows_ST = torch.randint(3, 264, (3, 16), generator=torch.Generator().manual_seed(5))
        self.model = load_causal_lm(teacher.path, torch.float32)

    @torch.no_grad()
    def hidden(self, index):
        return self.model.model(input_ids=self.windows_ST[index][None]).last_hidden_state[0]

    def divergence(self, model):
        return divergence(self.model, model, self.windows_ST)


@pytest.mark.parametrize("patience", [None, 1])
def test_evaluations_on_the_way_measure_what_is_learnt_and_end_a_training(tmp_path, checkpoints, patience):
    often = {"evaluate_every": ROWS * TOKENS, "patience": 1, "learning_rate": 0.5}  # a leap away
    task = task_of(checkpoints, "full, distill", **(often if patience else {"evaluate_every": ROWS * TOKENS * 2}))
    task = replace(task, held_out=HeldOut(checkpoints[1]), total_steps=7)
    trained = train_alone(task, tmp_path, save_every_steps=1)
    found = {line["step"]: line["held_out_kl"] for line in trained.losses if "held_out_kl" in line}
    assert list(found) == ([1, 2] if patience else [2, 4, 6, 7])
    assert train_alone(task, tmp_path).step == trained.step
    if patience is None:
        assert found[7] < found[2] < trained.losses[0]["untrained_kl"]
        model = load_causal_lm(task.checkpoint.path, torch.float32)
        model.load_state_dict(trained.weights, strict=False)
        assert found[7] == pytest.approx(task.held_out.divergence(model), rel=1e-4)


def test_evaluations_that_diverge_are_told(tmp_path, checkpoints):
    task = replace(task_of(checkpoints, "full, labels", evaluate_every=1), held_out=HeldOut(checkpoints[1]))
    task.held_out.hidden = lambda index: torch.full((16, 32), torch.nan)
    with pytest.raises(UserError, match=r"training diverged, \w+_kl is nan at step 1; lower recovery.learning_rate"):
        train_alone(task, tmp_path)


def test_an_interrupted_step_is_saved(tmp_path, checkpoints, monkeypatch):
    """What memory has decided holds for later attempts, whose time comes on top."""
    task, file = task_of(checkpoints, "full, labels"), tmp_path / "snapshot"
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    monkeypatch.setattr(trainer, "rows_at_once", lambda *_: 4)
    with pytest.raises(Interrupted):
        fine_tune(task, SoloWorld(), RuntimeConfig(), Progress(None), Interrupting(2), file, tmp_path / "run")
    (tmp_path / "whole").mkdir()
    expected = train_alone(task, tmp_path / "whole")
    monkeypatch.setattr(trainer, "rows_at_once", lambda *_: 1)
    resumed = train_alone(task, tmp_path)
    assert resumed.notes == {"micro_batch_size": 4, "fused_kernels": False, "seconds": 20}
    assert resumed.losses == expected.losses
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in resumed.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora, labels", "full, labels"])
def test_training_that_lacks_memory_goes_on_with_less(tmp_path, checkpoints, name, monkeypatch):
    """One rank lacks it in the second step, and again with checkpoints; weights of LoRA's model are sharded then."""
    task, loss, init = task_of(checkpoints, name), trainer.Trainer._loss, trainer.Trainer.__init__
    expected, _ = train(tmp_path / "one", 1, task)
    calls, placements = [], tmp_path / "placements"

    def note(self, task, start, world, placement):
        init(self, task, start, world, placement)
        self.failing = world.rank == 1 and placement.whole and (name == "lora, labels" or not placement.checkpointing)
        if world.is_first:
            with placements.open("a") as stream:
                stream.write(f"{placement.whole} {placement.checkpointing} {start.step}\n")

    def lack(self, *given):
        calls.append(0)
        if self.failing and len(calls) > 4:
            raise torch.OutOfMemoryError("no memory is left")
        return loss(self, *given)

    monkeypatch.setattr(trainer.Trainer, "_loss", lack)
    monkeypatch.setattr(trainer.Trainer, "__init__", note)
    found, _ = train(tmp_path / "two", 2, task)
    assert found.losses[-1]["loss"] == pytest.approx(expected.losses[-1]["loss"], rel=1e-4)
    steps = ["True False 0", "True True 1", *(["False True 1"] if name == "lora, labels" else [])]
    assert placements.read_text().splitlines() == steps


def live_bytes():
    gc.unfreeze()  # what an earlier test froze would be seen only later
    gc.collect()
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", ["lora, labels", "full, distill"])
def test_what_lacked_memory_is_gone_before_less_is_tried(tmp_path, checkpoints, name, monkeypatch):
    task, live = task_of(checkpoints, name, micro_batch_size=4), []

    class Short(trainer.Trainer):
        def __init__(self, task, start, world, placement):
            live.append(live_bytes())
            super().__init__(task, start, world, placement)
            self.left = 9 if placement.checkpointing else 3

        def _loss(self, *given):
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError
            return super()._loss(*given)

    monkeypatch.setattr(trainer, "Trainer", Short)
    trained = train_alone(task, tmp_path, save_every_steps=1)
    # A state of random numbers has 5,056 bytes; LoRA's gradients, the smallest of what was there, have 15,000.
    assert trained.step == task.total_steps and len(live) == 2 and live[1] - live[0] < 8192, live


def test_what_is_told_when_nothing_takes_less_memory(checkpoints):
    task = task_of(checkpoints, "full, labels", micro_batch_size=4)
    told = rf"; lower recovery.micro_batch_size or .* \(4 x {TOKENS} tokens\), or take more GPUs"
    with pytest.raises(torch.OutOfMemoryError, match=told):
        trainer.smaller(Placement(True, True, fits=False), task, "auto", SoloWorld())


def test_fused_kernels_are_for_gpus_and_leave_the_loss_alone(monkeypatch):
    model, applied = torch.nn.Linear(1, 1), []

    def apply(model, settings):
        applied.append(settings)
        model.forward = type("Kernel", (), {"__module__": "liger_kernel.transformers.rms_norm"})()

    monkeypatch.setattr(trainer, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(trainer, "apply_liger_kernel", apply)
    used = [trainer.use_fused_kernels(model, torch.device(device)) for device in ("cpu", "cuda")]
    assert used == [False, True] and applied == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


@pytest.mark.parametrize("fuses", [True, False])
def test_norms_of_gpus_and_adapters_compute_as_those_they_replace(checkpoints, monkeypatch, fuses):
    monkeypatch.setattr(memory_efficient_backward, "FUSES_NORMS", fuses)
    norm, x_TC, slope_TC = LlamaRMSNorm(16), *torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def results(device):
        norm.weight.data, norm.weight.grad = torch.linspace(0.5, 2, 16).to(device), None
        leaf = x_TC.clone().to(device).requires_grad_()
        norm(leaf).backward(gradient=slope_TC.to(device))
        return [each.detach().cpu() for each in (norm(leaf), leaf.grad, norm.weight.grad)]

    expected = results("cpu")
    replace_norms(norm)
    with pretended_gpu():
        torch.testing.assert_close(results(GPU), expected)
        output = norm.requires_grad_(False)(x_TC.to(GPU).requires_grad_())
    assert (output.grad_fn.name() == "RmsNormBackward") != fuses
    model = load_causal_lm(checkpoints[0].path, torch.float32)
    add_lora(model, task_of(checkpoints, "lora, labels"))
    adapted = next(module for module in model.modules() if isinstance(module, Linear))
    torch.nn.init.ones_(adapted.lora_B["default"].weight)
    x_TC = torch.randn(5, adapted.in_features)
    torch.testing.assert_close(adapted(x_TC), type(adapted).forward(adapted, x_TC))
