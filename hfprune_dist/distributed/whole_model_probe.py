"""Probes: what a whole model computes for one window, which a pass through its layers one by one must reproduce.

Such a pass makes each layer from its weights and a configuration. An architecture can do more than that between its
layers (scale embeddings, treat layers by their number), and a pass unaware of that would prune on wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import Family
from hfprune_dist.checkpoints.tensor_files import load_usable, save_tensors
from hfprune_dist.config.schema import Sharding
from hfprune_dist.distributed.frozen_model import FrozenModel, choose_sharding
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.evaluate import Evaluate

PROBE = "probe.safetensors"
# Positions of a window, evenly spread: enough to see any departure, and little to keep even for a large model.
POSITIONS = 32
# Errors that rounding explains: with the same shapes, both have the same bits; otherwise, the order of sums differs.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Probe:
    """Hidden states of a whole model at some positions of one window.

    Attributes:
        window_T: the window's token ids, int64 [tokens].
        states_LPC: in the model's dtype [num_layers + 2, positions, hidden_size]: what the first layer reads, what each
            layer puts out, and what the head reads.
    """

    window_T: Tensor
    states_LPC: Tensor

    def row_in(self, windows_ST: Tensor) -> int | None:
        """Index of the probe's window among some windows; None if it isn't one of them."""
        if windows_ST.shape[1] != len(self.window_T):
            return None
        rows = (windows_ST == self.window_T).all(dim=1).nonzero().flatten().tolist()
        return rows[0] if rows else None

    def micro_batch_of(self, windows_ST: Tensor, micro_batch_size: int) -> Tensor:
        """Return the windows of the probe's micro-batch, out of some windows that contain the probe's."""
        row = self.row_in(windows_ST)
        assert row is not None, "the probe is of another window"
        first = row // micro_batch_size * micro_batch_size
        return windows_ST[first : first + micro_batch_size]

    def error(self, place: int, hidden_TC: Tensor) -> float:
        """Relative error of a window's hidden states against the model's at a place of ``states_LPC``.

        The root mean square, over positions, of |theirs - the model's| / |the model's|. Positions at which the model
        itself is not finite don't count: other checks report those.
        """
        model_PC = self.states_LPC[place].double()
        finite_P = model_PC.isfinite().all(dim=1)
        theirs_PC = hidden_TC[_positions(len(self.window_T))].cpu().double()
        return relative_error(theirs_PC[finite_P], model_PC[finite_P])

    @property
    def tolerance(self) -> float:
        """The largest error that rounding explains."""
        return TOLERANCES[self.states_LPC.dtype]


def relative_error(ours_NC: Tensor, theirs_NC: Tensor) -> float:
    """Root mean square over the rows of |ours - theirs| / |theirs|; 0 without rows."""
    if not len(theirs_NC):
        return 0.0
    ratios_N = (ours_NC - theirs_NC).norm(dim=1) / theirs_NC.norm(dim=1).clamp(min=1e-30)
    return float(ratios_N.square().mean().sqrt())


class Guard:
    """Checks a pass against a probe, on the rank that has the probe's window.

    Args:
        windows_ST: the windows of the pass, int64 [windows, tokens]; the probe's is one of them.
        model_type: for messages.
    """

    def __init__(self, probe: Probe, windows_ST: Tensor, micro_batch_size: int, model_type: str) -> None:
        row = probe.row_in(windows_ST)
        assert row is not None, "the probe is of another window"
        self.micro_batch, self.row = divmod(row, micro_batch_size)
        self._probe = probe
        self._model_type = model_type

    def check(self, place: int, hidden: Mapping[int, Tensor]) -> None:
        """Compare hidden states with the model's.

        Args:
            place: in ``Probe.states_LPC``.
            hidden: micro-batch of this rank -> its hidden states [windows, tokens, hidden_size].

        Raises:
            UserError: on the rank that has the window, if they depart by more than rounding explains.
        """
        if self.micro_batch in hidden:
            error = self._probe.error(place, hidden[self.micro_batch][self.row])
            refuse_departure(error, self._probe.tolerance, self._what(place), "it is not supported")

    def _what(self, place: int) -> str:
        layers = len(self._probe.states_LPC) - 2
        names = {0: "embeddings", layers + 1: "the final norm's outputs"}
        what = names.get(place, f"outputs of layer {place - 1}")
        return f"{self._model_type}: taken through its layers one at a time, {what} depart from the whole model's"


def refuse_departure(error: float, tolerance: float, what: str, remedy: str) -> None:
    """End a pass that doesn't compute what the model does.

    Raises:
        UserError: if ``error`` is larger than ``tolerance``, or NaN.
    """
    if not error <= tolerance:
        raise UserError(
            f"{what} by {error:.2g} of their size (rounding explains {tolerance:g}). The architecture does more than "
            f"its entry in hfprune_dist/checkpoints/families.py says, so results would be wrong; {remedy}"
        )


def obtain_probe(
    checkpoint: Checkpoint,
    windows_ST: Tensor,
    dtype: torch.dtype,
    micro_batch_size: int,
    world: World,
    *,
    saved: Path | None,
    sharding: Sharding,
) -> Probe:
    """Return the probe of a model for a pass over some windows; collective.

    Args:
        saved: where a calibration pass of this model or ``save_probe`` left it. If neither did, or for other windows
            or another dtype, the whole model is loaded for one forward of the first micro-batch.
        sharding: how the model is then placed on the ranks (``runtime.sharding``).
    """
    probe = None if saved is None else world.on_rank0(lambda: _read(saved))
    if probe is not None and probe.states_LPC.dtype == dtype and probe.row_in(windows_ST) is not None:
        return probe
    return _computed(checkpoint, windows_ST[:micro_batch_size], dtype, sharding, world)


class ProbeRecorder:
    """Keeps a probe of the first forward of a sharded model, unless a file has one already.

    It is saved after the forward: if rank 0 failed to save it during the forward, the others would wait for it.

    Args:
        file: for ``obtain_probe``.
    """

    def __init__(self, file: Path, world: World) -> None:
        self._file = file
        self._world = world
        self._probes: list[Probe] = []  # on rank 0
        self._is_saved = False

    def record(self, model: nn.Module, family: Family) -> None:
        """Make the model's next forward leave a probe."""
        if self._world.is_first and not self._file.is_file():
            record_probe(model, family, self._probes.append)

    def save(self) -> None:
        """Save the probe, in the first call after that forward; collective.

        Raises:
            UserError: on all ranks, if rank 0 can't.
        """
        if not self._is_saved:
            self._world.on_rank0(self._save)
            self._is_saved = True

    def _save(self) -> None:
        for probe in self._probes:
            save_probe(probe, self._file)


def _computed(
    checkpoint: Checkpoint, windows_BT: Tensor, dtype: torch.dtype, sharding: Sharding, world: World
) -> Probe:
    job = Evaluate(0, 0, dtype.itemsize, window=windows_BT.numel())
    placed = choose_sharding(sharding, job, checkpoint, world)

    def compute() -> Probe:
        probes: list[Probe] = []
        model = FrozenModel(checkpoint, dtype, len(windows_BT), placed, world)
        record_probe(model.module, checkpoint.family, probes.append)
        model.run_body(windows_BT)
        model.release()
        return probes[0]

    return world.broadcast(compute()) if placed == "zero3" else world.on_rank0(compute)


def record_probe(model: nn.Module, family: Family, take: Callable[[Probe], None]) -> None:
    """Make the next forward of a model's body hand over a probe of its first window.

    Args:
        take: called amid a forward.
    """
    body, layers = family.body_of(model), family.layers_of(model)
    windows: list[Tensor] = []
    states: list[Tensor] = []

    def keep(hidden_BTC: Tensor) -> None:
        hidden_TC = hidden_BTC[0].detach()
        states.append(hidden_TC[_positions(len(hidden_TC)).to(hidden_TC.device)].cpu())

    def begin(_module: nn.Module, _inputs: Any, options: Mapping[str, Any]) -> None:
        windows.append(options["input_ids"][0].cpu())

    def before_first(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(inputs[0])

    def after_each(_module: nn.Module, _inputs: Any, output: Any) -> None:
        keep(output if isinstance(output, Tensor) else output[0])

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        keep(output.last_hidden_state)
        for handle in handles:
            handle.remove()
        take(Probe(windows[0], torch.stack(states)))

    handles = [
        body.register_forward_pre_hook(begin, with_kwargs=True),
        layers[0].register_forward_pre_hook(before_first),
        *(layer.register_forward_hook(after_each) for layer in layers),
        body.register_forward_hook(end),
    ]


def _positions(tokens: int) -> Tensor:
    """Positions of the tokens that a probe keeps, including the first and the last."""
    return torch.linspace(0, tokens - 1, min(tokens, POSITIONS)).round().long()


def save_probe(probe: Probe, file: Path) -> None:
    """Save a probe for ``obtain_probe``."""
    save_tensors({"input_ids": probe.window_T, "hidden_states": probe.states_LPC}, file)


def _read(file: Path) -> Probe | None:
    tensors = load_usable(file)
    return None if tensors is None else Probe(tensors["input_ids"], tensors["hidden_states"])
