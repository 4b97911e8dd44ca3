"""A second device that this machine only pretends to have: real code on real data fails where two devices meet.

    with pretended("cuda:0") as gpu:
        model.to(gpu.device)
        loss = model(batch.to(gpu.device)).sum()
        loss.backward()
        assert gpu.syncs == []      # nothing waited for the device
        result = loss.cpu()         # waits: gpu.syncs is now ["cpu at tests/x.py:7"]

Tensors "on the device" hold their numbers in the CPU's memory and tell everyone that they are on `gpu.device`, so that
results are exactly the CPU's. Every operation checks its tensors, also those inside torch's C++ functions and in
autograd. An operation on tensors of both devices raises DevicesMetError, except with a CPU tensor of one number, where
real devices allow it too, and except for copies. Indexing a device tensor with a CPU tensor raises as well: a real GPU
allows it and waits.

`gpu.syncs` lists what makes the CPU wait for the device: numbers read from it (item, tolist, numpy, cpu, bool), shapes
that depend on its numbers (nonzero, boolean masks, unique, repeat_interleave) and blocking copies to it (all but
`.pin_memory().to(device, non_blocking=True)`). Each entry has the line of this project that asked. `gpu.clear()`
empties the list.

It isn't a GPU: kernels, streams and precision stay untested, which is what benchmarks/gpu_check.py is for. Code that
asks torch.cuda whether there is a GPU still hears no; hand the device down, as the package does. Random numbers of the
device are the CPU's, and so is the state of its generator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from laserrec.util.device import CPU

_BENEATH = "lazy"
"""What torch's C++ takes the device for: one that no build of torch uses, that autograd runs like the CPU, and for
which every operation ends in `_run`."""
_ROOT = Path(__file__).parents[1]


class DevicesMetError(AssertionError):
    """One operation was given tensors of two devices."""


class OnDevice(Tensor):
    """A tensor that seems to be on the pretended device; `held` has its numbers."""

    held: Tensor
    machine: Machine
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, machine: Machine):
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=_BENEATH)
        made.held, made.machine = held, machine
        return made

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @property
    def is_cuda(self) -> bool:
        return self.machine.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self) if self.ndim else format(self.item(), spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        machine = next(t.machine for t in tree_leaves((args, kwargs)) if isinstance(t, OnDevice))
        return machine._run(func, args, kwargs)


_NUMBERS_READ = {"_local_scalar_dense", "equal"}
_SHAPES_READ = {"nonzero", "masked_select", "unique_consecutive", "_unique", "_unique2", "unique_dim", "bincount"}
_COPIES = {"copy_", "copy"}
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}
_NO_SCALARS = {"cat", "stack", "mm", "index_select", "index", "gather", "embedding"}
"""Real devices take no CPU tensor of one number beside these operations' other tensors."""


class Machine:
    """What happened on the pretended device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.syncs: list[str] = []
        """What made the CPU wait, in order: "operation at file:line"."""

    def clear(self) -> None:
        """Forget the syncs until now."""
        self.syncs.clear()

    def put(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device, without counting."""
        return OnDevice(tensor.detach(), self)

    def _sync(self, name: str) -> None:
        self.syncs.append(f"{name} at {_caller()}")

    def _run(self, func, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operation of torch's dispatcher."""
        name = func._schema.name.removeprefix("aten::")
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_to_copy" and kwargs.get("device") is not None:
            raise DevicesMetError(f"a tensor of another device was taken along silently at {_caller()}")
        self._check(name, leaves)
        self._count(name, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        held: dict[int, Tensor] = {}

        def unwrap(value: Any) -> Any:
            if not isinstance(value, OnDevice):
                return value
            held[id(value.held)] = value
            return value.held

        with torch.no_grad():
            out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if name in _COPIES and not isinstance(args[0], OnDevice):
            return args[0]
        # What was changed in place is returned as the tensor that came in.
        return tree_map(lambda t: (held[id(t)] if id(t) in held else self.put(t)) if isinstance(t, Tensor) else t, out)

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        strangers = [t for t in tensors if not isinstance(t, OnDevice)]
        numbers = name not in _NO_SCALARS and all(t.ndim == 0 for t in strangers)
        if not strangers or len(strangers) == len(tensors) or name in _COPIES or numbers:
            return
        found = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
        raise DevicesMetError(f"{name} was given tensors of two devices at {_caller()}: {found}")

    def _count(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if name in _COPIES:
            into, source = args[:2]
            if isinstance(into, OnDevice) != isinstance(source, OnDevice) and (
                    source.ndim or isinstance(source, OnDevice)):
                self._sync(name)
        elif name in _NUMBERS_READ | _SHAPES_READ or (
                name == "repeat_interleave" and kwargs.get("output_size") is None):
            self._sync(name)
        elif name in _INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self._sync(f"{name} with a boolean mask")

    # -- what Python code calls -------------------------------------------------------------------------------------

    def _is_here(self, device: Any) -> bool:
        if device is None or isinstance(device, int):
            return False
        device = torch.device(device)
        return device.type == _BENEATH or (
            device.type == self.device.type and device.index in (None, self.device.index))

    def _to(self, tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None, waits: bool, copy: bool,
            name: str, memory_format: torch.memory_format | None = None) -> Tensor:
        """Tensor.to with all that it was told."""
        here = isinstance(tensor, OnDevice)
        there = here if device is None else self._is_here(device)
        more = {} if memory_format is None else {"memory_format": memory_format}
        if here and there:
            return Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy, **more)
        if here and device.type != "cpu":
            raise DevicesMetError(f"a tensor of {self.device} was sent to {device} at {_caller()}")
        if here:
            self._sync(name)
        elif waits or not getattr(tensor, "pinned", False):
            self._sync(f"{name} to the device")
        return _Moved.apply(tensor, self, there).to(dtype=dtype or tensor.dtype, **more)


class _Moved(torch.autograd.Function):
    """From one device to the other, and its gradient back."""

    @staticmethod
    def forward(ctx, tensor: Tensor, machine: Machine, there: bool):
        ctx.machine, ctx.there = machine, there
        return machine.put(tensor.clone()) if there else tensor.held.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.held.clone() if ctx.there else ctx.machine.put(gradient.clone())), None, None


class _Functions(TorchFunctionMode):
    """torch's functions as Python code calls them: here is seen which device they were asked for."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, machine = kwargs or {}, self.machine
        if handler := _METHODS.get(func):
            return handler(machine, func, *args, **kwargs)
        if not machine._is_here(kwargs.get("device")):
            return func(*args, **kwargs)
        if any(isinstance(t, OnDevice) for t in tree_leaves((args, kwargs))):
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        wants = kwargs.pop("requires_grad", False)
        if kwargs.pop("pin_memory", False):
            raise ValueError("only CPU memory can be pinned")
        made = func(*args, **{**kwargs, "device": CPU})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            machine._sync(f"{func.__name__} to the device")
        return machine.put(made).requires_grad_(wants)


class _Operations(TorchDispatchMode):
    """Operations that torch's C++ functions begin by themselves, new tensors beside one of the device above all."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if any(isinstance(t, OnDevice) for t in tree_leaves((args, kwargs))) or (
                asked is not None and torch.device(asked).type == _BENEATH):
            return self.machine._run(func, args, kwargs)
        return func(*args, **kwargs)


def _to(machine: Machine, func, tensor: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        other, *args = args or [kwargs.pop("other")]
        device, dtype, waits, layout = other.device, other.dtype, True, None
    else:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        waits = not non_blocking
    if not isinstance(tensor, OnDevice) and not machine._is_here(device):
        return Tensor.to(tensor, device=device, dtype=dtype, non_blocking=not waits, copy=copy, memory_format=layout)
    return machine._to(tensor, device, dtype, waits, copy, "to", layout)


def _cuda(machine: Machine, func, tensor: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
    return machine._to(tensor, machine.device, None, not non_blocking, False, "cuda")


def _cpu(machine: Machine, func, tensor: Tensor, **_: Any) -> Tensor:
    return machine._to(tensor, CPU, None, True, False, "cpu") if isinstance(tensor, OnDevice) else tensor


def _pin(machine: Machine, func, tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, OnDevice):
        raise RuntimeError(f"cannot pin a tensor of {tensor.device}: only CPU memory can be pinned")
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def _read(machine: Machine, func, tensor: Tensor, *args, **kwargs) -> Any:
    """tolist, numpy: real devices refuse the second, so it is refused here."""
    if isinstance(tensor, OnDevice):
        if func is not Tensor.tolist:
            raise TypeError(f"can't convert a tensor of {tensor.device} to numpy; use Tensor.cpu() first")
        machine._sync("tolist")
        tensor = tensor.held
    return func(tensor.detach() if func is Tensor.tolist else tensor, *args, **kwargs)


def _new_tensor(machine: Machine, func, tensor: Tensor, data: Any, **kwargs) -> Tensor:
    if not isinstance(tensor, OnDevice):
        return func(tensor, data, **kwargs)
    machine._sync("new_tensor to the device")
    return machine.put(torch.tensor(data, dtype=kwargs.get("dtype", tensor.dtype)))


def _set_data(machine: Machine, func, tensor: Tensor, data: Tensor) -> None:
    if isinstance(tensor, OnDevice) != isinstance(data, OnDevice):
        raise DevicesMetError(f".data of another device was set at {_caller()}")
    if isinstance(tensor, OnDevice):
        tensor.held = data.held
    func(tensor, data)


_METHODS = {Tensor.data.__set__: _set_data,
            Tensor.to: _to, Tensor.cuda: _cuda, Tensor.cpu: _cpu, Tensor.pin_memory: _pin, Tensor.tolist: _read,
            Tensor.numpy: _read, Tensor.__array__: _read, Tensor.new_tensor: _new_tensor}


def _caller() -> str:
    """The innermost line of this project, tests included, that is not in this file."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file != Path(__file__) and file.is_relative_to(_ROOT) and ".venv" not in file.parts:
            return f"{file.relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line outside this project"


@contextmanager
def pretended(name: str = "cuda:0") -> Iterator[Machine]:
    """A machine whose `device` is used like any other inside the block, and which knows its `syncs`."""
    machine, make_generator = Machine(torch.device(name)), torch.Generator

    def generator(device: Any = "cpu") -> torch.Generator:
        return make_generator("cpu" if machine._is_here(device) else device)

    with ExitStack() as stack:
        for mode in (_Functions(machine), _Operations(machine)):
            stack.enter_context(mode)
        stack.enter_context(mock.patch("torch.Generator", generator))
        for module in ("cuda", "mps"):  # the device draws from the CPU's generator, and has the CPU's state
            for function, stand_in in (
                    ("synchronize", lambda device=None: machine._sync("synchronize")),
                    ("manual_seed", lambda seed: None),
                    ("get_rng_state", lambda device=None: torch.default_generator.get_state()),
                    ("set_rng_state", lambda state, device=None: torch.default_generator.set_state(state))):
                stack.enter_context(mock.patch(f"torch.{module}.{function}", stand_in))
        stack.enter_context(mock.patch("torch.cuda.default_generators", (torch.default_generator,)))
        yield machine
