"""Operations whose result the host must read, so that it would wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostReads(TorchDispatchMode):
    """Within the context, lists the names of operations that read a number, or whose result's size they must count."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(it, Tensor) and it.dtype == torch.bool for it in tree_leaves(args[1:])
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
