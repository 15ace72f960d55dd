"""The working model of a run, and snapshots of its states that hold only changed tensors. Imports torch."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.expert_count import resize_, stored_tensors
from interventions.rounding import Rounding, rounding_of, set_rounding_
from interventions.shared_statistics import StatisticsCache
from interventions.tying import tie_head_, tied_head, untie_head_
from pytest_lmcompose.build.load import hash_digests, tensor_digest


@dataclass(frozen=True)
class Snapshot:
    """A state of the model; unchanged tensors are shared with the snapshot that its last step started from."""

    changed: Mapping[str, Tensor]
    """Parameters and stored buffers that differ from the base model, on the host; read-only. Shapes differ if a step
    removed experts. A head's weight is there, too, if a step gave the head its own, which it shares with the embeddings
    in the base model."""
    digests: Mapping[str, str]
    """SHA-256 of each changed parameter."""
    state_hash: str
    """SHA-256 of all weights and of the rounding, see `load.hash_weights`."""
    rounding: Rounding
    """What the model rounds while it runs."""


class StateGoneError(RuntimeError):
    """The model is no longer in the requested state."""


class Lease:
    """The right to use the working model in one state, while it is the current lease."""

    def __init__(self, working: WorkingModel, snapshot: Snapshot, *, given: bool) -> None:
        self._working, self.snapshot = working, snapshot
        self.given = given
        """Whether the holder may change the model."""

    @property
    def model(self) -> Any:
        """The model; raises StateGoneError unless this is the current lease."""
        if self._working.lease is not self:
            raise StateGoneError(
                "the model is no longer in this state, because another one was requested: use a state before you "
                "request the next, or copy its model"
            )
        return self._working.model


class WorkingModel:
    """The model of a run, changed in place; it tracks its state and the lease of its current user.

    Any number of managers can share it.
    """

    def __init__(self, model: Any) -> None:
        """Take over `model` and copy its weights as the base state."""
        self.model = model
        parameters = self._parameters = stored_tensors(model)
        self._base = {name: _to_host(parameter) for name, parameter in parameters.items()}
        _wait(model)
        self._flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        self._use_cache = getattr(model.config, "use_cache", None)
        first_name = {id(parameter): name for name, parameter in parameters.items()}
        entries = model.state_dict(keep_vars=True).items()  # tied weights are listed under every name
        self._parameter_of = {entry: first_name.get(id(tensor)) for entry, tensor in entries}
        self._base_digests = {entry: tensor_digest(tensor) for entry, tensor in entries}
        self._tied_head = tied_head(model)
        self.base = self._snapshot({}, {}, rounding_of(model))
        self.statistics = StatisticsCache()
        """Statistics that steps collected, by the state they started from."""
        self.lease: Lease | None = None
        """The lease of the current user."""
        self._present = self.base
        self._trusted = True

    def lend(self, snapshot: Snapshot) -> Lease:
        """Return a lease of the model, which is in the state of `snapshot`; its holder may change the model."""
        self.lease = Lease(self, snapshot, given=True)
        self.distrust()
        return self.lease

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Let the caller change the state of the model; afterwards restore it for the previous lease."""
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
        """Make the next restore write every parameter, because anything may have changed."""
        self._trusted = False

    def take(self, before: Snapshot, names: Iterable[str]) -> Snapshot:
        """Return a snapshot of the model; the parameters `names` changed since `before`."""
        self._parameters = stored_tensors(self.model)  # a step may have replaced some
        copies = {name: _to_host(self._parameters[name]) for name in names}
        _wait(self.model)
        digests = {name: tensor_digest(copy) for name, copy in copies.items()}
        changed = {**before.changed, **copies}
        self._present = self._snapshot(changed, {**before.digests, **digests}, rounding_of(self.model))
        self._trusted = True
        return self._present

    def adopt(self, before: Snapshot, changed: Mapping[str, Tensor], rounding: Rounding) -> Snapshot:
        """Return the snapshot of a state that differs from the base model in `changed` (host tensors) and `rounding`.

        Tensors equal to those of `before` are shared with it. The model does not change. Raises KeyError or ValueError
        for tensors of another model.
        """
        digests = {name: tensor_digest(tensor) for name, tensor in changed.items()}
        tensors = {}
        for name, tensor in changed.items():
            base = self._base[self._in_base(name)]
            if (tensor.shape[1:], tensor.dtype) != (base.shape[1:], base.dtype) or tensor.dim() != base.dim():
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}")
            same = before.digests.get(name) == digests[name]
            tensors[name] = before.changed[name] if same else _pinned_like(tensor, base)
        return self._snapshot(tensors, digests, rounding)

    def values(self, snapshot: Snapshot) -> Mapping[str, Tensor]:
        """Return all parameters of a state, on the host; read-only."""
        return ChainMap(dict(snapshot.changed), self._base)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put the model into the state of `snapshot`, with its original mode and flags.

        Write the parameters that differ from the current state, or all of them after `distrust`.
        """
        if self._tied_head is not None:
            wanted_tied, tied = self._tied_head not in snapshot.changed, tied_head(self.model) is not None
            if wanted_tied != tied:
                (tie_head_ if wanted_tied else untie_head_)(self.model)
                self.distrust()
        if not self._trusted:
            self._parameters = stored_tensors(self.model)
        resize_(self.model, self.values(snapshot))
        for name, parameter in self._parameters.items():
            base = self._base[self._in_base(name)]
            wanted = snapshot.changed.get(name, base)
            if not self._trusted or wanted is not self._present.changed.get(name, base):
                parameter.copy_(wanted, non_blocking=True)
            parameter.requires_grad_(self._flags[self._in_base(name)])
            parameter.grad = None
        _wait(self.model)
        if not self._trusted or snapshot.rounding != self._present.rounding:
            set_rounding_(self.model, snapshot.rounding)
        if self.model.training or not self._trusted:
            self.model.eval()
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache
        self._present, self._trusted = snapshot, True

    def _in_base(self, name: str) -> str:
        """Return the name of a parameter in the base model, where the head may share another one; raises KeyError."""
        return name if name in self._base else self._parameter_of[name] or name

    def _snapshot(self, changed: Mapping[str, Tensor], digests: Mapping[str, str], rounding: Rounding) -> Snapshot:
        names = self._parameter_of.items()
        every = {
            entry: digests.get(entry) or digests.get(name or "", self._base_digests[entry]) for entry, name in names
        }
        return Snapshot(changed, digests, hash_digests(every | rounding.digests()), rounding)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the size of `tensors` in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the host; it is ready only after `_wait`."""
    copy = _host_memory(tensor, pinned=tensor.device.type == "cuda")
    return copy.copy_(tensor.detach(), non_blocking=True)


def _pinned_like(tensor: Tensor, base: Tensor) -> Tensor:
    return _host_memory(tensor, pinned=True).copy_(tensor) if base.is_pinned() else tensor


def _host_memory(tensor: Tensor, *, pinned: bool) -> Tensor:
    if pinned:  # the GPU accesses such memory several times faster
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # the process may not pin more memory
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _wait(model: nn.Module) -> None:
    """Wait until copies between the GPUs of `model` and the host are done."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
