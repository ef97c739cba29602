"""Whether weights were written to, by whomever: as often as a generation begins, within a
millisecond."""

from __future__ import annotations

from collections.abc import Iterable

import torch

#: So many elements of each weight are looked at.
_SAMPLES = 8


class WeightWatch:
    """Weights as they are when this is made.

    Each is known by its address, by how often torch saw it written to, and by the values of a few
    elements, spread over it: writes through ``.data``, as optimisers, averages and adapters do
    them, count nowhere, but change all elements.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        every = {id(w): w for w in weights if w.device.type != "meta"}
        self._weights = list(every.values())
        self._counted = [w for w in self._weights if not w.is_inference()]
        self._marks = self._mark()
        self._samples: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
        for weight in self._weights:
            if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.numel() > 0:
                kind = weight.device, weight.element_size()
                self._samples.setdefault(kind, []).append(_sample(weight))
        self._values = self._read()

    def changed(self) -> bool:
        """Whether something was written. For weights on a GPU the host waits."""
        return self._mark() != self._marks or not all(
            torch.equal(now, then) for now, then in zip(self._read(), self._values, strict=True)
        )

    def _mark(self) -> tuple[list[int], list[int]]:
        # Torch does not count writes to what was made in inference mode.
        versions = [w._version for w in self._counted]
        return [w.data_ptr() for w in self._weights], versions

    def _read(self) -> list[torch.Tensor]:
        return [torch.cat(samples) for samples in self._samples.values()]


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Bytes of a few elements, as a view that does not hold the weight itself."""
    size = weight.element_size()
    strides = zip(weight.shape, weight.stride(), strict=True)
    extent = 1 + sum((n - 1) * stride for n, stride in strides)
    count = min(_SAMPLES, extent)
    step = max(1, (extent - 1) // max(1, count - 1))
    memory = torch.empty(0, dtype=torch.uint8, device=weight.device)
    begin = weight.storage_offset() * size
    return memory.set_(weight.untyped_storage(), begin, (count, size), (step * size, 1))
