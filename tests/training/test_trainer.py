"""The loss of recovery is a mean over all tokens of a step, whatever a model's class does by itself."""

from dataclasses import replace

import pytest
import torch
from families import save_model
from fine_tunings import make_task, train
from torch.nn.functional import cross_entropy

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.data.schedule import IGNORED, Schedule
from hfprune_dist.models.loading import load_causal_lm

ROWS, TOKENS = 3, 24


# By themselves, Qwen models would take each micro-batch's mean, which is NaN without a label, and Mixtral would add its
# experts' load-balancing loss.
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma3", {}),
        ("qwen3_vl", {}),
        ("mixtral", {"output_router_logits": True}),
    ],
)
def test_rows_count_by_their_tokens_and_idle_slots_not_at_all(tmp_path, model_type, changes):
    checkpoint = open_checkpoint(save_model(tmp_path / "model", model_type, **changes))
    ids_ST = torch.randint(3, 30, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels_ST = torch.stack([it.index_fill(0, torch.arange(5 * row + 1), IGNORED) for row, it in enumerate(ids_ST)])
    positions_T = torch.arange(TOKENS)
    task = replace(
        make_task(checkpoint, dtype="float32", dropout=0.0, learning_rate=1e-12),
        rows=lambda row: {"input_ids": ids_ST[row], "labels": labels_ST[row].clone(), "position_ids": positions_T},
        schedule=Schedule(ROWS, 2, 0),  # a step of one row, with an idle slot, and a step of two
        total_steps=2,
    )
    trained, _ = train(tmp_path / "run", 1, task)

    model = load_causal_lm(checkpoint.path, torch.float32).eval()
    for step, line in enumerate(trained.losses):
        rows = task.schedule.rows_of(step)
        with torch.no_grad():
            logits_STV = model(input_ids=ids_ST[rows], position_ids=positions_T.expand(len(rows), -1)).logits
        expected = cross_entropy(logits_STV[:, :-1].flatten(0, 1), labels_ST[rows, 1:].flatten(), ignore_index=IGNORED)
        assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
