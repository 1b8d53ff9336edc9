"""Tensors that count what a host would wait for if they were on a GPU: no GPU is needed, all is computed on the CPU.

What is computed from such a tensor is one too, as if it were on the device; what is copied to the host is none. So an
answer for which the host waits (a value, a length that depends on values) is told from work on what the host has.
What is made there from nothing (`torch.arange`) is not told apart.
"""

import collections
import sys

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

ATEN = torch.ops.aten
ASK = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.is_nonzero.default,
       ATEN.equal.default, ATEN._unique2.default, ATEN.unique_consecutive.default, ATEN.unique_dim.default,
       ATEN.repeat_interleave.Tensor, ATEN.bincount.default}  # fmt: skip
"""Operations whose answer or shape depends on values."""
BY_MASK = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}
LIBRARIES = {"srd_lightning", "transformers", "lightning", "torchmetrics"}
OF_TRANSFORMERS = "transformers.masking_utils"
"""Where models look whether rows are packed or padded, which no argument keeps them from; it is not counted."""


class Waits(collections.Counter):
    """Counts waits by what is asked and which module asks, while it is on."""

    def __init__(self):
        super().__init__()
        self.on = False

    def note(self, what):
        if not self.on:
            return
        frame = sys._getframe()
        while (name := frame.f_globals["__name__"]).partition(".")[0] not in LIBRARIES and not name.startswith("test_"):
            frame = frame.f_back
        if name != OF_TRANSFORMERS:
            self[what, name.rpartition(".")[2]] += 1


WAITS = Waits()


class OnDevice(torch.Tensor):
    """A tensor that is as if on a device."""

    @staticmethod
    def __new__(cls, value):
        settings = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, value.size(), **settings)

    def __init__(self, value):
        self.value = value

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        WAITS.note("tolist")
        return self.value.tolist()

    def numpy(self):
        WAITS.note("numpy")
        return self.value.numpy()

    def cpu(self):
        WAITS.note("cpu")
        return self.value

    def new_tensor(self, data, **settings):
        WAITS.note("copy to the device")
        return OnDevice(self.value.new_tensor(data, **settings))

    def __getitem__(self, index):
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list) or (isinstance(part, torch.Tensor) and not isinstance(part, OnDevice)):
                WAITS.note("copy to the device")
        return super().__getitem__(index)

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), settings=None):
        settings = settings or {}
        masks = BY_MASK if operation in BY_MASK else ()
        if operation in ASK or (masks and any(part is not None and part.dtype == torch.bool for part in arguments[1])):
            WAITS.note(str(operation).removeprefix("aten."))
        inner, inner_settings = tree_map(
            lambda part: part.value if isinstance(part, cls) else part, (arguments, settings)
        )
        found = operation(*inner, **inner_settings)
        found = tree_map(lambda part: cls(part) if isinstance(part, torch.Tensor) else part, found)
        return return_and_correct_aliasing(operation, arguments, settings, found)


def to_device(module):
    """Put the parameters and buffers of a module there, tied ones once."""
    known = {}
    for part in module.modules():
        for place in (part._parameters, part._buffers):
            for name, value in place.items():
                if value is not None and id(value) not in known:
                    moved = OnDevice(value.detach())
                    known[id(value)] = (
                        torch.nn.Parameter(moved, value.requires_grad) if place is part._parameters else moved
                    )
                place[name] = known.get(id(value))
    return module
