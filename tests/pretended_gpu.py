"""A pretended GPU: its tensors are really on the CPU, but obey a GPU's rules.

They don't mix with tensors that aren't on this GPU, and operations that a GPU refuses, or refuses under deterministic
algorithms, are refused here too. Streams and events only keep order: what a stream, or the host, uses without having
waited for whatever else works on it is a fault. Where the host would wait for the GPU is noted.

What torch's C++ does by itself, NCCL's own streams, the choice of kernels and the size of memory can't be seen here.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import Variable
from torch.cuda._sanitizer import StreamSynchronizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hfprune_dist.core import losses

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Operations that take tensors of both devices; the first tensor determines where the result is.
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_MIXING = (*_INDEXING, "copy_", "set_", "_to_copy")
# Operations that run no kernel.
_FREE = (
    *("detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"),
    *("lift_fresh", "_local_scalar_dense", "is_same_size", "set_", "resize_", "is_pinned"),
)
# Operations whose result, or its size, the host must know.
_HOST_READS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive"),
    *("unique_dim", "bincount", "_linalg_check_errors"),
)
# Matrix products, which a GPU has of floats alone.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv")

# Operations that raise on a GPU under deterministic algorithms: those of torch's list (use_deterministic_algorithms)
# without pooling or images, and others that its CUDA kernels refuse. Some are judged by their arguments.
_REFUSED = (
    *("nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "_embedding_bag", "put", "put_", "kthvalue"),
    *("median", "nanmedian", "index_reduce", "index_reduce_", "scatter_reduce", "scatter_reduce_", "segment_reduce"),
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
        return any(weights is not None for weights in (*args[1:2], options.get("weights")))
    return name in _REFUSED and ("median" not in name or len(function._schema.returns) == 2)  # with indices


class Gpu:
    """What is seen of a pretended GPU.

    Attributes:
        faults: uses of memory that nothing keeps apart.
        waits: why the host waited for the GPU and for which line -> how often.
        moved: bytes that were copied, by where to.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.waits: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self._there: set[int] = set()  # storages
        self._pinned: set[int] = set()
        # Storage -> stream -> number of the last operation there that reads or writes it.
        self._reads: dict[int, dict[int, int]] = {}
        self._writes: dict[int, dict[int, int]] = {}
        self._order = StreamSynchronizations()
        self._operations = 0
        self._current = threading.local()
        self._lock = threading.RLock()

    @property
    def stream(self) -> int:
        return getattr(self._current, "stream", 0)

    def put(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta and not self.holds(tensor):
            self._there.add(_key(tensor))
            weakref.finalize(tensor.untyped_storage(), self._forget, _key(tensor))
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and _key(tensor) in self._there

    def pin(self, tensor: Tensor) -> Tensor:
        if not self.pins(tensor):
            self._pinned.add(_key(tensor))
            weakref.finalize(tensor.untyped_storage(), self._forget, _key(tensor))
        return tensor

    def pins(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and _key(tensor) in self._pinned

    def run(self, name: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Note a kernel or a copy on the current stream."""
        with self._lock:
            self._operations += 1
            stream = self.stream
            self._order.update_seq_num(stream, self._operations)
            for tensor in reads:
                self._require_order(name, tensor, self._writes)
                self._reads.setdefault(_key(tensor), {})[stream] = self._operations
            for tensor in writes:
                self._require_order(name, tensor, self._writes, self._reads)
                self._writes[_key(tensor)] = {stream: self._operations}
                self._reads.pop(_key(tensor), None)

    def _require_order(self, name: str, tensor: Tensor, *uses: dict[int, dict[int, int]]) -> None:
        for stream, number in (use for kind in uses for use in kind.get(_key(tensor), {}).items()):
            if not self._order.is_ordered_after(self.stream, number, stream):
                self.faults.append(f"{name} on stream {self.stream} does not wait for stream {stream}, {_place()}")

    def on_host(self, name: str, tensor: Tensor, *, writes: bool) -> None:
        """Note that the host uses pinned memory."""
        for kind in (self._writes, self._reads) if writes else (self._writes,):
            for stream, number in kind.get(_key(tensor), {}).items() if self.pins(tensor) else ():
                if number > self._order.host_sync_state.get(stream, 0):
                    self.faults.append(f"{name} on the host does not wait for stream {stream}, {_place()}")

    def wait(self, why: str) -> None:
        """Note that the host waits for the current stream."""
        with self._lock:
            self.waits[f"{why}, {_place()}"] += 1
            self._order.all_streams_wait_for_stream(self.stream)

    def _forget(self, key: int) -> None:
        for places in (self._there, self._pinned):
            places.discard(key)
        for uses in (self._reads, self._writes):
            uses.pop(key, None)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Let torch.cuda be that of this GPU."""
        gpu, order, streams = self, self._order, {}

        class Event:
            def __init__(self, *_args, **_options):
                order.create_event(id(self))

            def record(self, stream=None):
                order.record_state(id(self), stream.number if stream else gpu.stream)

            def synchronize(self):
                gpu.waits[f"event, {_place()}"] += 1
                order.all_streams_wait_for_event(id(self))

            def wait(self, stream=None):
                order.stream_wait_for_event(stream.number if stream else gpu.stream, id(self))

            def query(self):
                return True

        class Stream:
            device = GPU

            def __init__(self, *_args, **_options):
                self.number = len(streams)
                streams[self.number] = self
                order.create_stream(self.number)

            def record_event(self, event=None):
                event = event or Event()
                event.record(self)
                return event

            def wait_event(self, event):
                event.wait(self)

            def wait_stream(self, other):
                self.wait_event(other.record_event())

            def synchronize(self):
                gpu.waits[f"stream, {_place()}"] += 1
                order.all_streams_wait_for_stream(self.number)

        @contextmanager
        def entered(stream):
            before, gpu._current.stream = gpu.stream, stream.number
            try:
                yield
            finally:
                gpu._current.stream = before

        def set_device(_device):  # where the reader's thread begins, too
            if threading.current_thread() is not threading.main_thread():
                _Calls(gpu).__enter__()
                _Operations(gpu).__enter__()

        default, properties = Stream(), SimpleNamespace(total_memory=2**36, major=9, minor=0, uuid="pretended")
        replaced = {"Stream": Stream, "Event": Event, "stream": entered, "set_device": set_device}
        replaced |= {"current_stream": lambda _=None: streams[gpu.stream], "default_stream": lambda _=None: default}
        replaced |= {"synchronize": lambda _=None: gpu.wait("synchronize"), "is_available": lambda: True}
        answers = {"device_count": 1, "current_device": 0, "mem_get_info": (2**36, 2**36), "memory_stats": {}}
        answers |= {"get_device_name": "pretended", "get_device_capability": (9, 0), "is_bf16_supported": True}
        answers |= {"get_device_properties": properties, "is_current_stream_capturing": False, "is_initialized": True}
        answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), 0)
        answers |= dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "manual_seed_all", "_lazy_init"))
        replaced |= {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("range_push", "range_pop"):
            patch.setattr(torch.cuda.nvtx, name, lambda *_: None)
        patch.setattr(
            Tensor, "pin_memory", lambda tensor, *_: tensor if self.pins(tensor) else self.pin(tensor.clone())
        )
        patch.setattr(Tensor, "record_stream", lambda *_: None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place() -> str:
    """The line of the project that runs, or otherwise the innermost one of a library."""
    frame, outside = sys._getframe(1), ""
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/hfprune_dist/")
        if folder:
            return f"{file}:{frame.f_lineno}"
        if not outside and "/torch/" not in file and "pretended_gpu" not in file:
            outside = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


class _Operations(TorchDispatchMode):
    """Puts results where their arguments are, which must be in one place; CPU scalars may go anywhere."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        gpu, options, schema = self._gpu, kwargs or {}, function._schema
        name = schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor) and not leaf.is_meta]
        there = [gpu.holds(tensor) for tensor in tensors]
        if any(there):
            self._judge(name, function, args, options, tensors, there)
        is_wide = name == "mm" and function._overloadname == "dtype"  # which only GPUs have
        results = args[0].to(args[2]) @ args[1].to(args[2]) if is_wide else function(*args, **options)
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and not leaf.is_meta]
        if there[:1] == [True] if name in _MIXING else any(there):
            for tensor in made:
                gpu.put(tensor)
        writing = [args[0]] if name.startswith("c10d::") else []  # their schemas don't say
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                writing.append(args[number] if number < len(args) else options.get(argument.name))
        written = {id(tensor) for tensor in tree_leaves(writing)}
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if name == "copy_" and any(there) and not all(there):
            to, source = tensors
            gpu.moved["host" if there[1] else "GPU"] += source.nbytes
            gpu.run(name, [source], [to])
            is_queued = args[2] if len(args) > 2 else options.get("non_blocking")
            if not is_queued or not gpu.pins(source if there[0] else to):
                gpu.wait("copy")
        elif any(map(gpu.holds, [*tensors, *made])) and not is_view and name not in _FREE:
            outputs = [tensor for tensor in tensors if id(tensor) in written] or made
            gpu.run(
                name,
                [tensor for tensor in tensors if gpu.holds(tensor)],
                [tensor for tensor in outputs if gpu.holds(tensor)],
            )
        elif not any(there) and not is_view and (name not in _FREE or name == "_local_scalar_dense"):
            for tensor in tensors:
                gpu.on_host(name, tensor, writes=id(tensor) in written)
        return results

    def _judge(self, name, function, args, options, tensors, there):
        """Note where the host waits for an operation's result; refuse what a GPU does."""
        gpu = self._gpu
        of_host = [tensor for tensor, is_there in zip(tensors, there, strict=True) if not is_there and tensor.dim()]
        if name in _INDEXING:
            if not there[0] or ("put" in name and any(tensor is args[2] for tensor in of_host)):
                raise MixedError(f"{name} of tensors of both devices")
            is_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1]))
            if of_host or is_mask:
                gpu.wait(f"{name} by a mask" if is_mask else f"{name} by numbers of the host")
        elif name not in _MIXING and of_host:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise MixedError(f"{name} of {shapes}, of which these are on the GPU: {there}")
        if name in _PRODUCTS and not all(tensor.is_floating_point() for tensor in tensors):
            raise RefusedError(f"{name} of integers")
        generator = options.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise MixedError(f"{name} with a generator of the CPU")
        if _is_refused(name, function, args, options):
            raise RefusedError(name)
        counts = name == "repeat_interleave" and options.get("output_size") is None
        if name in _HOST_READS or counts:
            gpu.wait(name)


class _Calls(TorchFunctionMode):
    """Reports where tensors are, and moves them."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self._gpu
        if function is Tensor.backward:  # its hooks ask where tensors are, too
            with self:
                run, keeps_graph = Variable._execution_engine.run_backward, bool(kwargs.get("retain_graph"))
                gradient = kwargs.get("gradient")
                if gradient is None:
                    gradient = gpu.put(torch.ones_like(args[0]))
                how = {"allow_unreachable": True, "accumulate_grad": True}
                return run(args[:1], (gradient,), keeps_graph, False, (), **how)
        with torch._C.DisableTorchFunction():
            first = args[0] if args and isinstance(args[0], Tensor) else None
            name = getattr(function, "__name__", "")
            is_there = first is not None and gpu.holds(first)
            if function == _DEVICE_OF:
                return GPU if is_there else function(*args)
            if function == Tensor.is_cuda.__get__:
                return is_there
            if name == "is_pinned":
                return gpu.pins(first)
            if name == "get_device" and is_there:
                return 0
            if name == "numpy" and is_there:
                raise MixedError("numpy of a tensor on the GPU")
            if name in ("tolist", "numpy") and first is not None:
                gpu.on_host(name, first, writes=False)
            if name == "tolist" and is_there:
                gpu.wait(name)
                gpu.moved["host"] += first.nbytes
            if name == "cpu":
                return self._away(first, is_there)
            if name == "cuda":
                return self._here(first, is_there)
            if name == "to" and first is not None:
                return self._moved(first, is_there, args[1:], kwargs)
            if name == "histc":  # its counts of integers exist only on a GPU
                args = first.float(), *args[1:]
            is_pinned, target = kwargs.pop("pin_memory", False), kwargs.get("device")
            kind = None if target is None else torch.device(target).type
            if target is not None:
                kwargs["device"] = CPU if kind == "cuda" else target
            if kind == "cpu" and is_there and name.endswith("_like"):
                first, is_there = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype), False
                args = first, *args[1:]
            result = function(*args, **kwargs)
            if isinstance(result, Tensor) and not result.is_meta:
                if kind == "cuda" or (name == "new_tensor" and is_there):
                    if name in ("tensor", "as_tensor", "new_tensor") and result.numel() and not gpu.holds(result):
                        gpu.wait("tensor of values of the host")
                    gpu.put(result)
                elif kind == "cpu" and is_there:
                    return self._away(result, gpu.holds(result))
                elif is_pinned:
                    gpu.pin(result)
            return result

    def _moved(self, tensor, is_there, args, kwargs):
        target, others, flags = kwargs.pop("device", None), [], []
        for argument in args:
            if isinstance(argument, Tensor):
                target = GPU if self._gpu.holds(argument) else argument.device
                others.append(argument.dtype)
            elif isinstance(argument, torch.dtype):
                others.append(argument)
            elif isinstance(argument, bool):
                flags.append(argument)
            elif isinstance(argument, torch.device | str):
                target = argument
        is_queued = kwargs.pop("non_blocking", any(flags[:1]))
        if target is not None and torch.device(target).type == "meta":
            return tensor.to(target, *others, **kwargs)
        result = tensor.to(*others, **kwargs) if others or kwargs else tensor
        if target is None:
            return self._gpu.put(result) if is_there else result
        wanted = torch.device(target).type == "cuda"
        if is_there:
            self._gpu.put(result)
        return self._here(result, is_there, is_queued) if wanted else self._away(result, is_there)

    def _here(self, tensor, is_there, is_queued=False):
        if is_there:
            return tensor
        with _disable_current_modes():
            made = self._gpu.put(tensor.clone())
        self._gpu.run("to", [tensor], [made])
        self._gpu.moved["GPU"] += tensor.nbytes
        if not (is_queued and self._gpu.pins(tensor) and tensor.is_contiguous()):
            self._gpu.wait("copy to the GPU")
        return made

    def _away(self, tensor, is_there):
        if not is_there:
            return tensor
        self._gpu.run("to", [tensor], [])
        self._gpu.moved["host"] += tensor.nbytes
        self._gpu.wait("copy to the host")
        with _disable_current_modes():
            return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """Within the context, tensors may be moved to ``GPU``; mixing them with others raises ``MixedError``."""
    gpu = Gpu()
    losses._signs_of_bytes.cache_clear()  # which may be of another one
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # whose threads don't see the modes
        gpu.patch(patch)
        with _Calls(gpu), _Operations(gpu):
            yield gpu
