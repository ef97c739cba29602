"""Whether a caller's tensor was written to since it was looked at.

Torch counts the writes to a tensor, but not to one that was made in inference mode. Of such a
tensor a copy is kept, to compare it with. On the CPU that is done at once. On a GPU the host would
have to wait in every step: there the comparison is issued behind the caller's work, the tensor is
taken for unchanged meanwhile, and the result is looked at once, when the generation has ended and
the host waits anyway. A write in between is then an error, which says what to do: nothing is wrong
in silence.
"""

from __future__ import annotations

import torch

from ..errors import InputError


class Seen:
    """A caller's tensor as it was when it was looked at.

    ``version`` counts its writes; ``value`` is a copy, where torch does not count them.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        counted = not tensor.is_inference()
        self.version = tensor._version if counted else -1
        self.value = None if counted else tensor.clone()


class Writes:
    """What was found out, and on which device it is yet to be looked at."""

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
        equal = _bits(tensor) == _bits(value)
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


def _waits(device: torch.device) -> bool:
    """Whether the host would have to wait for a value that lies there."""
    return device.type != "cpu"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, among which those of a NaN are equal to themselves."""
    return tensor.detach().reshape(-1).view(torch.uint8)
