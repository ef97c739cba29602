"""The split denoiser of one of ComfyUI's models, for as long as a MODEL of the node uses it."""

from __future__ import annotations

import uuid
import weakref
from typing import TYPE_CHECKING, Any

import torch

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.tracing.repeats import unread
from asyncdiff.integrations.auto import AutoSettings

from .settings import Settings

if TYPE_CHECKING:
    from .sampling import Sampling


# ComfyUI tells each block which one it is, for what other nodes patch into blocks, which the node
# refuses: else each would be exported by itself.
unread("comfy.ldm.", "transformer_options", ["block", "block_index", "transformer_index"])


class Host:
    """Owns what asyncdiff holds for a model (ComfyUI's ``BaseModel``), whose MODELs are clones that
    share its weights; only one of them is loaded at a time."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._denoiser: AsyncDenoiser | None = None
        #: what the denoiser was asked for last, and what picks its settings, if that is a quality
        self._settings: Settings | None = None
        self.auto: AutoSettings | None = None
        self._users = 0
        #: what stands for the patches of weights that ComfyUI shall not count on, and these
        self._lent: tuple[uuid.UUID, uuid.UUID] | None = None
        #: the sampler's run that is under way
        self.run: Sampling | None = None

    @property
    def model(self) -> Any:
        """ComfyUI's model. It outlives its MODELs."""
        return self._model()

    @property
    def open(self) -> bool:
        """Whether ranks hold anything."""
        return self._denoiser is not None

    def denoiser(self, settings: Settings) -> AsyncDenoiser:
        """The split denoiser with these settings; with a quality, with those that :attr:`auto`
        picked last. Raises what AsyncDenoiser does."""
        with torch.inference_mode(False):
            if self._denoiser is None:
                module = self.model.diffusion_model.eval()
                self._denoiser = AsyncDenoiser(module, config=settings.config)
            elif settings.quality is None:
                self._denoiser.adopt(settings.config)
            if settings != self._settings:
                self._settings, self.auto = settings, _auto(settings)
        return self._denoiser

    def close(self) -> None:
        """Free what ranks hold. The next run prepares anew."""
        denoiser, self._denoiser = self._denoiser, None
        self._settings, self.auto = None, None
        if denoiser is not None:
            with torch.inference_mode(False):
                denoiser.close()

    # ---- the MODELs that use it --------------------------------------------------------------

    def joined(self, patcher: Any) -> None:
        """A MODEL uses it; when the last one is gone, it is closed."""
        self._users += 1
        weakref.finalize(patcher, self._left).atexit = False

    def _left(self) -> None:
        self._users -= 1
        if self._users == 0:
            self.close()
            self.lend()

    def lend(self) -> None:
        """Let a MODEL that is not of the node load its weights where it wants them, although the
        patches on them are those that it wants: they lie in host memory."""
        model = self.model
        now = getattr(model, "current_weight_patches_uuid", None)
        if now is not None and (self._lent is None or now != self._lent[0]):
            self._lent = uuid.uuid4(), now
            model.current_weight_patches_uuid = self._lent[0]

    def take_back(self) -> None:
        """Weights are what they were, if none has loaded them meanwhile."""
        if self._lent is not None and self.model.current_weight_patches_uuid == self._lent[0]:
            self.model.current_weight_patches_uuid = self._lent[1]
        self._lent = None


def _auto(settings: Settings) -> AutoSettings | None:
    if settings.quality is None:
        return None
    devices = list(settings.devices)
    return AutoSettings(settings.quality, devices, settings.config, range(len(devices)))


_hosts: weakref.WeakKeyDictionary[Any, Host] = weakref.WeakKeyDictionary()


def host_of(model: Any) -> Host:
    """The host of a model, made where there is none yet."""
    host = _hosts.get(model)
    if host is None:
        _hosts[model] = host = Host(model)
    return host
