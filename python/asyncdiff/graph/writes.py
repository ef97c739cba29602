"""Whether tensors were written to since they were looked at.

Torch counts the writes to a tensor, but not to one that was made in inference mode, nor those
through ``.data``.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .layers.quantized import plain

#: So many elements of each weight are looked at.
_SAMPLES = 8


#: The addresses of weights that were written to; None: any of them may have been.
Written = set[int] | None


class WeightWatch:
    """Weights as they are when this is made; looked at within milliseconds, whenever a generation
    begins.

    Each is known by its address, by how often torch saw it written to, and by the values of a few
    elements, spread over it: writes through ``.data``, as optimisers, averages and adapters do
    them, change all elements.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._weights = list({id(w): w for w in weights if w.device.type != "meta"}.values())
        #: those whose writes torch counts
        self._counted = [w for w in self._weights if not w.is_inference()]
        self._marks = self._mark()
        #: elements by kind, as views (of host memory numpy's), and of each row which weight's they
        #: are
        self._samples: dict[tuple[torch.device, int], list[Any]] = {}
        self._owners: dict[tuple[torch.device, int], list[int]] = {}
        for weight in self._weights:
            if weight.numel() > 0:
                kind, elements = (weight.device, weight.element_size()), sample(weight)
                host = weight.device.type == "cpu"
                self._samples.setdefault(kind, []).append(_array(elements) if host else elements)
                self._owners.setdefault(kind, []).extend([id(weight)] * len(elements))
        self._values = self._read()
        #: what was found by now: who looked may have taken what has been put back since
        self._written: Written = set()

    def changed(self) -> bool:
        """Whether something was written, also where it was put back after it was found here. For
        weights on a GPU the host waits."""
        same = self._mark() == self._marks and all(
            torch.equal(now, self._values[kind]) for kind, now in self._read().items()
        )
        if same and self._written == set():
            return False
        self.written()
        return True

    def written(self, now: Iterable[torch.Tensor] = ()) -> Written:
        """The addresses of those that torch has seen written to, and of weights that there are
        ``now`` and were not then; None where it has not seen all, as a few elements tell: it may be
        any then. For weights on a GPU the host waits."""
        found, earlier = self._differing(), self._written
        self._written = None if found is None or earlier is None else found | earlier
        if self._written is None:
            return None
        return self._written | {*map(id, now)}.difference(map(id, self._weights))

    def _differing(self) -> Written:
        """Those that are not now what they were."""
        counted: set[int] = set()
        of = self._weights, self._counted
        for weights, marks, earlier in zip(of, self._mark(), self._marks, strict=True):
            each = zip(weights, marks, earlier, strict=True)
            counted |= {id(w) for w, mark, before in each if mark != before}
        for kind, now in self._read().items():
            rows = (now != self._values[kind]).any(1).nonzero().flatten().tolist()
            if not {self._owners[kind][row] for row in rows} <= counted:
                return None
        return counted

    def _mark(self) -> tuple[list[int], list[int]]:
        """Where the weights lie, and how often torch saw those written to whose writes it counts:
        of thousands, before every generation."""
        counts = map(attrgetter("_version"), self._counted)
        return [*map(torch.Tensor.data_ptr, self._weights)], [*counts]

    def _read(self) -> dict[tuple[torch.device, int], torch.Tensor]:
        """The elements now, by kind, a row each."""
        return {kind: _together(samples) for kind, samples in self._samples.items()}


class Seen:
    """A caller's tensor as it was when it was looked at.

    ``version`` counts its writes; ``value`` is a copy, where torch does not count them.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = _version(tensor)
        self.value = tensor.clone() if self.version is None else None


class Writes:
    """What was found out of callers' tensors, and on which device it is yet to be looked at.

    A tensor without count is compared with the copy: at once on the CPU. On a GPU the host would
    have to wait in every step: there the comparison is issued behind the caller's work, the tensor
    is taken for unchanged meanwhile, and the result is looked at once, when the generation has
    ended and the host waits anyway. A write in between is then an error, which says what to do:
    nothing is wrong in silence.
    """

    def __init__(self) -> None:
        self._differs: dict[torch.device, torch.Tensor] = {}

    def same(self, tensor: torch.Tensor, seen: Seen | None) -> bool:
        """Whether a tensor is one that was seen and not written to since then; of tensors that were
        made in inference mode on a GPU, whether that is to be assumed until :meth:`check`."""
        if seen is None or seen.tensor is not tensor:
            return False
        if seen.value is None:
            return bool(tensor._version == seen.version)
        return self.unchanged(tensor, seen.value)

    def unchanged(self, tensor: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether a tensor still has this value, by its bits; on a GPU True until :meth:`check`."""
        equal = bits(tensor) == bits(value)
        if not _waits(tensor.device):
            return bool(equal.all())
        differs = ~equal.all()
        earlier = self._differs.get(tensor.device)
        self._differs[tensor.device] = differs if earlier is None else differs | earlier
        return True

    def check(self) -> None:
        """Raise InputError if what was assumed was wrong. The host waits for the devices."""
        wrong = any(bool(differs) for differs in self._differs.values())
        self.clear()
        if wrong:
            raise InputError(
                "a tensor made in torch.inference_mode() was written to in the middle of a "
                "generation: torch does not count such writes, and the ranks went on with the old "
                "values. Pass another tensor instead, or use torch.no_grad()"
            )

    def clear(self) -> None:
        """Forget what is yet to be looked at."""
        self._differs.clear()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, among which those of a NaN are equal to themselves."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 1:  # its stride means nothing, and may be any
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def _version(tensor: torch.Tensor) -> int | None:
    """How often torch saw the tensor written to; None where it does not count."""
    return None if tensor.is_inference() else tensor._version


def sample(weight: torch.Tensor) -> torch.Tensor:
    """Bytes of a few elements, spread over the weight's memory, as a view."""
    strides = zip(weight.shape, weight.stride(), strict=True)
    extent = 1 + sum((n - 1) * stride for n, stride in strides)
    count = min(_SAMPLES, extent)
    step = max(1, (extent - 1) // max(1, count - 1))
    return plain(weight).as_strided((count, 1), (step, 1)).view(torch.uint8)


def _array(elements: torch.Tensor) -> Any:
    """The elements of a :func:`sample` in host memory for numpy, which puts thousands of views
    together in a fraction of the time that torch takes."""
    # Not numpy(), after which the weight's storage could not be resized any more.
    array, size = np.from_dlpack(elements), elements.shape[1]
    return array.view(f"i{size}")[:, 0] if size <= 8 else array


def _together(samples: list[Any]) -> torch.Tensor:
    if isinstance(samples[0], torch.Tensor):
        return torch.cat(samples)
    found = torch.from_numpy(np.concatenate(samples))
    return found.view(len(found), -1)


def _waits(device: torch.device) -> bool:
    """Whether the host would have to wait for a value that lies there."""
    return device.type != "cpu"
