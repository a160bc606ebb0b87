"""Worlds of several ranks that are threads of this process: milliseconds where real ranks take seconds.

Ranks wait for each other in each collective. Where they don't all call the same one, every rank gets a
``DivergedError`` that says which rank called what, instead of hanging. Collectives are logged per rank. A rank can be
made to die before any of its collectives.

``without_deepspeed`` gives these ranks a calibration pass without ZeRO-3, but its gathers still count as collectives.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from ranks import run_here

from hfprune_dist.distributed.world import World
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.scoring import shard_scorer
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage

T = TypeVar("T")
PATIENCE_S = 600.0


class DivergedError(AssertionError):
    """Ranks called different collectives, or one ended while others waited for it."""


class LostRankError(Exception):
    """Raised on the other ranks in their next collective once one has failed."""


class Death(BaseException):
    """The end of a rank that was scheduled to die."""


class Ranks:
    """Ranks that are threads, and where they meet; ``deaths``: rank -> number of the collective it dies before."""

    def __init__(self, size: int, deaths: Mapping[int, int] | None = None) -> None:
        self.size = size
        self.logs: list[list[str]] = [[] for _ in range(size)]
        self._deaths = dict(deaths or {})
        self._changed = threading.Condition()
        self._here: dict[int, tuple[str, Any]] = {}
        self._brought: list[Any] = []
        self._meetings = 0
        self._ended: list[int] = []
        self._error: Exception | None = None
        self._causes: list[BaseException] = []

    def run(self, work: Callable[[World], T]) -> list[T]:
        """Return what ``work`` returns on every rank; raise what the first rank to fail raised."""
        results: dict[int, T] = {}

        def live(rank: int) -> None:
            try:
                results[rank] = work(ThreadWorld(rank, self))
            except BaseException as error:
                self._fail(rank, error)
            else:
                self._end(rank)

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.size)]
        # Making a model changes the process's default for a while; threads doing so at once may restore each other's.
        default_dtype = torch.get_default_dtype()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.set_default_dtype(default_dtype)
        if self._causes:
            raise self._causes[0]
        return [results[rank] for rank in range(self.size)]

    def counts(self, rank: int = 0) -> Counter[str]:
        """Return how often a rank took part in each kind of collective."""
        return Counter(self.logs[rank])

    def meet(self, rank: int, kind: str, mine: Any = None) -> list[Any]:
        """Take part in a collective, named alike on every rank; return what each contributed, in rank order."""
        if self._deaths.get(rank) == len(self.logs[rank]):
            raise Death(f"rank {rank} before its collective {len(self.logs[rank])}, {kind}")
        with self._changed:
            self.logs[rank].append(kind)
            self._here[rank] = kind, mine
            meeting = self._meetings
            if len(self._here) == self.size:
                self._close_meeting()
            elif self._ended:
                self._diverge()
            if not self._changed.wait_for(lambda: self._error or self._meetings > meeting, PATIENCE_S):
                self._error = DivergedError(f"stuck: {self._places()}")
            if self._error and self._meetings == meeting:
                raise self._error
            return self._brought

    def _close_meeting(self) -> None:
        if len({kind for kind, _ in self._here.values()}) > 1:
            self._diverge()
            return
        self._brought = [self._here[rank][1] for rank in range(self.size)]
        self._here = {}
        self._meetings += 1
        self._changed.notify_all()

    def _diverge(self) -> None:
        self._error = self._error or DivergedError(self._places())
        self._changed.notify_all()

    def _places(self) -> str:
        here = [
            f"rank {rank} is in its collective {len(self.logs[rank]) - 1}, {kind}"
            for rank, (kind, _) in self._here.items()
        ]
        ended = [f"rank {rank} has ended after {len(self.logs[rank])}" for rank in self._ended]
        return "; ".join([*here, *ended])

    def _end(self, rank: int) -> None:
        with self._changed:
            self._ended.append(rank)
            if self._here:
                self._diverge()

    def _fail(self, rank: int, error: BaseException) -> None:
        with self._changed:
            if not isinstance(error, LostRankError):
                self._causes.append(error)
            self._error = self._error or LostRankError(f"rank {rank} failed: {error!r}")
            self._changed.notify_all()


class ThreadWorld(World):
    """One of the ranks, as a stage sees it."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        super().__init__(rank=rank, size=ranks.size, local_size=ranks.size, device=torch.device("cpu"))
        object.__setattr__(self, "_ranks", ranks)

    def together(self, kind: str, mine: Any = None) -> list[Any]:
        """Take part in a collective, which may be one outside the world's methods: a forward of a sharded model."""
        ranks: Ranks = object.__getattribute__(self, "_ranks")
        return ranks.meet(self.rank, kind, mine)

    def broadcast(self, value: T) -> T:
        brought = self.together("broadcast", pickle.dumps(value) if self.is_first else b"")
        return value if self.is_first else pickle.loads(brought[0])

    def all_gather(self, value: T) -> list[T]:
        return [pickle.loads(theirs) for theirs in self.together("all_gather", pickle.dumps(value))]

    def broadcast_tensor(self, tensor: torch.Tensor, source: int) -> None:
        mine = tensor.clone() if self.rank == source else None
        kind = f"broadcast_tensor from {source}, {tensor.dtype} {list(tensor.shape)}"
        tensor.copy_(self.together(kind, mine)[source])

    def all_reduce(self, tensor: torch.Tensor) -> None:
        brought = self.together(f"all_reduce {tensor.dtype} {list(tensor.shape)}", tensor.clone())
        tensor.copy_(torch.stack(brought).sum(0))

    def reduce(self, tensor: torch.Tensor, owner: int) -> None:
        brought = self.together(f"reduce {owner}, {tensor.dtype} {list(tensor.shape)}", tensor.clone())
        tensor.copy_(torch.stack(brought).sum(0)) if self.rank == owner else tensor.fill_(-1)


FORWARD, BACKWARD, HEAD = "forward", "backward", "gather head"


def without_deepspeed(monkeypatch: Any) -> None:
    """Let ``ShardScorer`` load whole models; their forwards and backwards are collectives, as if they were sharded."""
    loaded: dict[Any, torch.nn.Module] = {}
    reading = threading.Lock()

    def place(checkpoint, dtype, _sharding, world, *, backward_of_body):
        assert backward_of_body
        with reading:
            if (checkpoint.path, dtype) not in loaded:
                loaded[checkpoint.path, dtype] = load_causal_lm(checkpoint.path, dtype).requires_grad_(False).eval()
            model = copy.deepcopy(loaded[checkpoint.path, dtype])
        family = checkpoint.family
        body = family.body_of(model)
        body.register_forward_pre_hook(lambda *_: world.together(FORWARD) and None)  # keeps its inputs
        head = family.head_of(model)

        @contextlib.contextmanager
        def gathered():
            world.together(HEAD)
            yield head.weight.data, None if head.bias is None else head.bias.data

        return SimpleNamespace(
            world=world,
            module=model,
            final_hidden=lambda ids_T: body(input_ids=ids_T[None], use_cache=False).last_hidden_state[0],
            head=gathered,
            before_backward=lambda: lambda: world.together(BACKWARD),
            release=lambda: None,
        )

    monkeypatch.setattr(shard_scorer, "FrozenModel", place)


def run_in_threads(store: Store, stage: Stage, ranks: Ranks, **runtime: Any) -> None:
    """Run a stage to its end on these ranks, as the launcher's processes would."""
    ranks.run(lambda world: run_here(store, stage, world, **runtime))
