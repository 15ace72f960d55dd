"""The working model of a run, and snapshots of its states: only the tensors that changed. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.shared_statistics import StatisticsCache
from pytest_lmcompose.build.load import hash_digests, tensor_digest


@dataclass(frozen=True)
class Snapshot:
    """A state of the model. What a step left alone is shared with the snapshot that it started from."""

    changed: Mapping[str, Tensor]
    """Parameters that differ from the base model, on the host; never written to."""
    digests: Mapping[str, str]
    """SHA-256 of each of them."""
    state_hash: str
    """SHA-256 of all weights, as `load.hash_weights` makes it."""


class StateGoneError(RuntimeError):
    """The model was asked for in a state that it is not in any more."""


class Lease:
    """The right to use the working model in one state. It rests while another lease is above it."""

    def __init__(self, working: WorkingModel, snapshot: Snapshot, *, given: bool) -> None:
        self._working, self.snapshot = working, snapshot
        self.given = given
        """Whether its holder may change the model."""

    @property
    def model(self) -> Any:
        """The model; raises StateGoneError unless it is in the state of this lease now."""
        if self._working.lease is not self:
            raise StateGoneError(
                "the model is not in this state any more, since another one was asked for: use a state before you "
                "ask for the next, or copy its model"
            )
        return self._working.model


class WorkingModel:
    """The one model of a run, changed in place, which knows what state it is in and who uses it.

    It builds states for any number of managers. Only the holder of the current lease gets at the model.
    """

    def __init__(self, model: Any) -> None:
        """Take over `model` and copy its weights: they are the base state."""
        self.model = model
        parameters = self._parameters = dict(model.named_parameters())
        self._base = {name: _to_host(parameter) for name, parameter in parameters.items()}
        _wait(model)
        self._flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        self._use_cache = getattr(model.config, "use_cache", None)
        first_name = {id(parameter): name for name, parameter in parameters.items()}
        entries = model.state_dict(keep_vars=True).items()  # tied weights stand there under every name
        self._parameter_of = {entry: first_name.get(id(tensor)) for entry, tensor in entries}
        self._base_digests = {entry: tensor_digest(tensor) for entry, tensor in entries}
        self.base = self._snapshot({}, {})
        self.statistics = StatisticsCache()
        """What steps have collected, by the state that they started from."""
        self.lease: Lease | None = None
        """Of whoever uses the model now."""
        self._present = self.base
        self._trusted = True

    def lend(self, snapshot: Snapshot) -> Lease:
        """Return a lease of the model in the state of `snapshot`, which it is in; all others end.

        Its holder may change the model.
        """
        self.lease = Lease(self, snapshot, given=True)
        self.distrust()
        return self.lease

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Let the caller bring the model into other states; then whoever used it before gets it back as it was."""
        before, self.lease = self.lease, None
        try:
            yield
        finally:
            self.lease = before
            if before is not None:
                self.restore(before.snapshot)
                if before.given:
                    self.distrust()

    def distrust(self) -> None:
        """Expect any change of the model until the next restore, which then writes every parameter."""
        self._trusted = False

    def take(self, before: Snapshot, names: Iterable[str]) -> Snapshot:
        """Return a snapshot of the model, in which the parameters `names` changed since `before`."""
        self._parameters = dict(self.model.named_parameters())  # a step may have put others in their place
        copies = {name: _to_host(self._parameters[name]) for name in names}
        _wait(self.model)
        digests = {name: tensor_digest(copy) for name, copy in copies.items()}
        self._present = self._snapshot({**before.changed, **copies}, {**before.digests, **digests})
        self._trusted = True
        return self._present

    def adopt(self, before: Snapshot, changed: Mapping[str, Tensor]) -> Snapshot:
        """Return the snapshot of a state that differs from the base model in `changed`, host tensors.

        Tensors that `before` has with the same values are shared with it. The model is left as it is.
        Raises KeyError or ValueError for tensors that are not of this model.
        """
        digests = {name: tensor_digest(tensor) for name, tensor in changed.items()}
        tensors = {}
        for name, tensor in changed.items():
            base = self._base[name]
            if (tensor.shape, tensor.dtype) != (base.shape, base.dtype):
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}")
            same = before.digests.get(name) == digests[name]
            tensors[name] = before.changed[name] if same else _pinned_like(tensor, base)
        return self._snapshot(tensors, digests)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Bring the model into the state of `snapshot`, its mode and flags as they were loaded.

        Writes the parameters that differ from the present state, or all of them if it is not trusted.
        """
        if not self._trusted:
            self._parameters = dict(self.model.named_parameters())
        for name, parameter in self._parameters.items():
            wanted = snapshot.changed.get(name, self._base[name])
            if not self._trusted or wanted is not self._present.changed.get(name, self._base[name]):
                parameter.copy_(wanted, non_blocking=True)
            parameter.requires_grad_(self._flags[name])
            parameter.grad = None
        _wait(self.model)
        if self.model.training or not self._trusted:
            self.model.eval()
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache
        self._present, self._trusted = snapshot, True

    def _snapshot(self, changed: Mapping[str, Tensor], digests: Mapping[str, str]) -> Snapshot:
        names = self._parameter_of.items()
        # What is no parameter, a buffer, is never changed by a step.
        every = {entry: digests.get(name or "", self._base_digests[entry]) for entry, name in names}
        return Snapshot(changed, digests, hash_digests(every))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the memory of `tensors` in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the host, ready only after `_wait`."""
    copy = _host_memory(tensor, pinned=tensor.device.type == "cuda")
    return copy.copy_(tensor.detach(), non_blocking=True)


def _pinned_like(tensor: Tensor, base: Tensor) -> Tensor:
    return _host_memory(tensor, pinned=True).copy_(tensor) if base.is_pinned() else tensor


def _host_memory(tensor: Tensor, *, pinned: bool) -> Tensor:
    if pinned:  # the GPU reads and writes such memory several times as fast
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # as much as the system lets a process pin
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _wait(model: nn.Module) -> None:
    """Wait until copies between the GPUs of `model` and the host are done."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
