"""A pretend GPU: tensors that hold CPU numbers and say that they are on cuda:0.

What CUDA refuses is refused (tensors of two devices in one operation, a CPU generator for a GPU
tensor), and what would make the CPU wait for the GPU is counted by the line that asks for it.
Sampling, decoding and forward passes run under it; backward, NCCL and real kernels do not.

    with pretend_gpu() as seen:
        list(generate(backend, sampler, jobs, batch=4))  # a backend on "cuda"
    assert not seen.waits
"""

import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = f"{Path(__file__).parent.parent}/"
CUDA = torch.device("cuda:0")
aten = torch.ops.aten
WAITING = (
    *("nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal", "is_nonzero"),
    "_local_scalar_dense",
)
"""Operations whose result's size or truth the CPU must know."""
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
"""They take indices from the CPU for a tensor on the GPU."""
NO_SCALARS = (
    *("cat", "stack", "mm", "bmm", "addmm", "linear", "convolution", "embedding", "gather"),
    *("scatter", "searchsorted", "bucketize", "index_select", "native_layer_norm"),
)
"""They refuse a CPU tensor even of no dimension, which pointwise operations take."""
ANSWERS: dict[str, Any] = {
    **{"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretend"},
    **{"get_device_capability": (9, 0), "is_bf16_supported": True},
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "max_memory_reserved"), 0),
    **dict.fromkeys(("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats")),
    "set_sync_debug_mode": None,
}
"""What torch.cuda is to say meanwhile."""


@dataclass
class Seen:
    """How often a line made the CPU wait for the GPU, or sent it a tensor."""

    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)


class OnGPU(Tensor):
    """A tensor on the pretend GPU; `numbers` are the real ones, `seen` what was asked of it."""

    numbers: Tensor
    seen: Seen

    @staticmethod
    def __new__(cls: type, real: Tensor, seen: Seen) -> "OnGPU":
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(
            cls, real.size(), **layout, dtype=real.dtype, device=CUDA
        )
        tensor.numbers, tensor.seen = real, seen
        return tensor

    def __init__(self, real: Tensor, seen: Seen) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = next(t.seen for t in tree_leaves((args, kwargs)) if isinstance(t, OnGPU))
        return Pretend(seen).__torch_dispatch__(func, types, args, kwargs)

    def tolist(self) -> Any:
        self.seen.waits[f"tolist: {line_of_ours()}"] += 1
        return self.numbers.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy  # pyright: ignore[reportAssignmentType]


class Pretend(TorchDispatchMode):
    """Runs every operation on the CPU, and keeps track of where its tensors are said to be."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE
    allow_non_fake_inputs = allow_meta = static_shapes = True  # what torch asks of such a mode
    in_kernel_invocation = cache_enabled = False
    shape_env = None

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        on_gpu = [t for t in leaves if isinstance(t, OnGPU)]
        on_cpu = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, OnGPU)]
        given = kwargs.get("device")
        target = torch.device(given) if given is not None else None
        if func in (aten._to_copy.default, aten.copy_.default) or (name == "to" and target):
            return self.copy(func, args, kwargs, target)
        indices = [i for i in (args[1] if name == "index" else ()) if isinstance(i, Tensor)]
        by_mask = any(i.dtype == torch.bool for i in indices)  # whose size the CPU must know
        if on_gpu and (name in WAITING or by_mask):
            self.seen.waits[f"{name}: {line_of_ours()}"] += 1
        if name == "_local_scalar_dense":
            return func(*tree_map(real, args))
        refuse_mixed(func, name, args, on_gpu, on_cpu)
        goes_to_gpu = bool(on_gpu) if target is None else target.type == "cuda"
        if goes_to_gpu and any(isinstance(g, torch.Generator) for g in leaves):
            raise RuntimeError(f"expected a 'cuda' generator in {name}: {line_of_ours()}")
        if target is not None and target.type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func is aten._softmax.default and args[2]:
            args = (real(args[0]).float(), args[1], False)  # half to float, which CUDA alone has
        results = func(*tree_map(real, args), **tree_map(real, kwargs))
        return tree_map(lambda x: self.wrapped(x, on_gpu) if goes_to_gpu else x, results)

    def wrapped(self, result: Any, inputs: list[OnGPU]) -> Any:
        """A result as a tensor on the GPU; what an operation changed in place is itself."""
        if not isinstance(result, Tensor):
            return result
        same = [t for t in inputs if t.numbers is result]
        return same[0] if same else OnGPU(result, self.seen)

    def copy(self, func: Any, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        """A copy between devices, or on one."""
        into_given = func is aten.copy_.default
        source = args[1] if into_given else args[0]
        to = args[0].device if into_given else target or source.device
        if to.type == "cpu" and isinstance(source, OnGPU):
            self.seen.waits[f"to cpu: {line_of_ours()}"] += 1
        if to.type == "cuda" and not isinstance(source, OnGPU):
            self.seen.uploads[line_of_ours()] += 1
        if to.type != "meta":
            kwargs = {n: v for n, v in kwargs.items() if n != "device"}
        result = func(*tree_map(real, args), **kwargs)
        if into_given:
            return args[0]
        return OnGPU(result, self.seen) if to.type == "cuda" else result


def real(value: Any) -> Any:
    """A tensor's numbers on the CPU; anything else as it is."""
    return value.numbers if isinstance(value, OnGPU) else value


def refuse_mixed(
    func: Any, name: str, args: Any, on_gpu: list[OnGPU], on_cpu: list[Tensor]
) -> None:
    """RuntimeError where CUDA would raise for tensors of two devices."""
    wrong = [t for t in on_cpu if t.ndim or name in NO_SCALARS]
    if not on_gpu or not wrong:
        return
    values = [t for t in args[2:3] if isinstance(t, Tensor) and not isinstance(t, OnGPU)]
    if func in BY_INDEX and isinstance(args[0], OnGPU) and not any(v.ndim for v in values):
        return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        f"and cpu! ({name}, {line_of_ours()})"
    )


def line_of_ours() -> str:
    """The innermost line of the repository that is at work, but for this file."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(HERE) and "site-packages" not in path and path != __file__:
            line = linecache.getline(path, frame.f_lineno).strip()
            return f"{path.removeprefix(HERE)}:{frame.f_lineno} {line}"
        frame = frame.f_back
    return "?"


@contextmanager
def pretend_gpu() -> Iterator[Seen]:
    """A machine with one GPU; what happens to wait for it is in the value."""
    seen = Seen()
    torch._C._ensureCUDADeviceGuardSet()
    lifted = torch._C._only_lift_cpu_tensors()
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for name, answer in ANSWERS.items():
                stack.enter_context(patch.object(torch.cuda, name, lambda *_, a=answer, **__: a))
            stack.enter_context(Pretend(seen))
            yield seen
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
