"""A pretended GPU: its tensors are really on the CPU, but don't mix with tensors that aren't on this GPU.

Operations that a GPU refuses under deterministic algorithms are refused here too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Operations that take tensors of both devices; the first tensor determines where the result is.
_MIXING = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_", "set_", "_to_copy")


# Operations that raise on a GPU under deterministic algorithms: torch's own list (torch.use_deterministic_algorithms),
# and others that its CUDA kernels refuse. Conditional ones are judged by their arguments.
_REFUSED = (
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward"),
    *("reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("_ctc_loss_backward", "_embedding_bag", "put", "put_", "kthvalue", "median", "nanmedian"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "index_reduce", "index_reduce_", "scatter_reduce"),
    *("scatter_reduce_", "segment_reduce"),
)
_REFUSED_OF_FLOATS = ("cumsum", "cumsum_", "logcumsumexp", "_logcumsumexp")

_DEVICE_OF = Tensor.device.__get__


class MixedError(AssertionError):
    """An operation got tensors of both devices."""


class RefusedError(AssertionError):
    """An operation would not have the same bits each time."""


def _is_refused(name, function, args, options):
    if name in _REFUSED_OF_FLOATS:
        return (options.get("dtype") or args[0].dtype).is_floating_point
    if name == "bincount":
        return any(it is not None for it in (*args[1:2], options.get("weights")))
    return name in _REFUSED and ("median" not in name or len(function._schema.returns) == 2)  # with indices


class _Places:
    """The storages that are considered to be on the GPU."""

    def __init__(self) -> None:
        self._there: set[int] = set()

    def put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._there:
            self._there.add(storage._cdata)
            weakref.finalize(storage, self._there.discard, storage._cdata)
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._there


class _Operations(TorchDispatchMode):
    """Puts results where their arguments are, which must be in one place; CPU scalars may go anywhere."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        tensors = [it for it in tree_leaves((args, kwargs or {})) if isinstance(it, Tensor) and not it.is_meta]
        there = [self._places.holds(it) for it in tensors]
        name = function._schema.name.removeprefix("aten::")
        if name in _MIXING:
            there = there[:1]
        elif any(there) and any(it.dim() for it, is_there in zip(tensors, there, strict=True) if not is_there):
            shapes = [tuple(it.shape) for it in tensors]
            raise MixedError(f"{name} of {shapes}, of which these are on the GPU: {there}")
        if any(there) and _is_refused(name, function, args, kwargs or {}):
            raise RefusedError(name)
        results = function(*args, **(kwargs or {}))
        if any(there):
            for it in tree_leaves(results):
                if isinstance(it, Tensor):
                    self._places.put(it)
        return results


class _Calls(TorchFunctionMode):
    """Reports where tensors are, and moves them."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.backward:  # its hooks ask where tensors are, too
            with self:
                run, keeps_graph = Variable._execution_engine.run_backward, bool(kwargs["retain_graph"])
                how = {"allow_unreachable": True, "accumulate_grad": True}
                return run(args, (kwargs["gradient"],), keeps_graph, False, (), **how)
        with torch._C.DisableTorchFunction():
            first = args[0] if args and isinstance(args[0], Tensor) else None
            name = getattr(function, "__name__", "")
            is_there = first is not None and self._places.holds(first)
            if function == _DEVICE_OF:
                return GPU if is_there else function(*args)
            if name == "numpy" and is_there:
                raise MixedError("numpy of a tensor on the GPU")
            if name == "cpu":
                return self._away(first, is_there)
            if name == "cuda":
                return self._here(first, is_there)
            if name == "to" and first is not None:
                return self._moved(first, is_there, args[1:], kwargs)
            if name == "histc":  # its counts of integers exist only on a GPU
                args = first.float(), *args[1:]
            kwargs.pop("pin_memory", None)
            target = kwargs.get("device")
            if target is not None:
                kwargs["device"] = CPU if torch.device(target).type == "cuda" else target
            result = function(*args, **kwargs)
            if isinstance(result, Tensor) and not result.is_meta:
                if target is not None and torch.device(target).type == "cuda":
                    self._places.put(result)
                elif target is not None and is_there and torch.device(target).type == "cpu":
                    return self._away(result, self._places.holds(result))
                elif name == "new_tensor" and is_there:
                    self._places.put(result)
            return result

    def _moved(self, tensor, is_there, args, kwargs):
        kwargs.pop("non_blocking", None)
        target, others = kwargs.pop("device", None), []
        for it in args:
            if isinstance(it, Tensor):
                target = GPU if self._places.holds(it) else it.device
                others.append(it.dtype)
            elif isinstance(it, torch.dtype):
                others.append(it)
            elif isinstance(it, torch.device | str):
                target = it
        if target is not None and torch.device(target).type == "meta":
            return tensor.to(target, *others, **kwargs)
        result = tensor.to(*others, **kwargs) if others or kwargs else tensor
        if target is None:
            return self._places.put(result) if is_there else result
        wanted = torch.device(target).type == "cuda"
        if is_there:
            self._places.put(result)
        return self._here(result, is_there) if wanted else self._away(result, is_there)

    def _here(self, tensor, is_there):
        return tensor if is_there else self._places.put(tensor.clone())

    def _away(self, tensor, is_there):
        if not is_there:
            return tensor
        away = torch.empty(tensor.shape, dtype=tensor.dtype)
        with torch.no_grad():
            away.copy_(tensor)
        return away


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within the context, tensors may be moved to ``GPU``; mixing them with others raises ``MixedError``."""
    places = _Places()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "set_device", lambda _device: None)
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.cuda, "get_device_name", lambda _device=None: "pretended")
        patch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (7, 0))
        patch.setattr(torch.cuda, "mem_get_info", lambda _device=None: (2**36, 2**36))
        with _Calls(places), _Operations(places):
            yield
