"""Undo a step that fails, and find out which weights a step changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.expert_count import resize_, stored_tensors
from interventions.tying import say_tied_, tied_head
from interventions.types import InterventionError
from interventions.zeros import zero_mask

_WORD = 8
"""Octets."""
_PART = 2**14
"""Words per sum."""


class SafetyCopy:
    """Host copies of the parameters that a step may change, checksums of the others, and the module structure."""

    def __init__(
        self, model: nn.Module, may_change: Collection[str] | None = None, copies: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy the parameters `may_change` (None: all), unless the caller has host `copies` of all of them.

        Raises InterventionError for parameters without values.
        """
        self._model = model
        self.parameters = stored_tensors(model)
        absent = [name for name, p in self.parameters.items() if p.is_meta]
        if absent:
            raise InterventionError(
                f"{absent[0]} has no values: load the model without offloading to the host or to disk; "
                "interventions.offload streams a model from the CPU"
            )
        if copies is None:
            names = _first_names(model, self.parameters if may_change is None else may_change)
            copies = {name: self.parameters[name].detach().to("cpu", copy=True) for name in names}
        self.copies = {name: copies[name] for name in self.parameters if name in copies}
        self._checksums = {name: _checksum(p) for name, p in self.parameters.items() if name not in copies}
        self._tied_head = tied_head(model)
        self._model = model
        # To undo methods that replace modules or parameters.
        self._places = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]

    @torch.no_grad()
    def keep_zeros(self, model: nn.Module) -> dict[str, int]:
        """Reset the weights of pruned linears that were exactly zero to zero.

        Returns the number of refilled zeros as a detail of the step, or nothing if no linear was pruned.
        """
        now = dict(model.named_parameters())
        filled: list[int] = []
        for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
            name = linear.parameter_name
            if name not in self.copies or name not in now or self.copies[name].shape != now[name].shape:
                continue
            weight = linear.within(now[name])
            mask = zero_mask(linear.within(self.copies[name]))
            if mask is not None:
                mask = mask.to(weight.device)
                filled.append(int((weight[mask] != 0).sum()))
                weight.masked_fill_(mask, 0)
        return {"zeros_refilled": sum(filled)} if filled else {}

    def changed(
        self, model: nn.Module, method: str, *, may_be_none: bool = False, may_resize: bool = False
    ) -> tuple[str, ...]:
        """Return the names of the parameters and stored buffers whose values differ from the copy, sorted.

        A head that shared the weights of the embeddings may have its own now; they count as changed. Raises
        InterventionError if nothing changed (unless `may_be_none`), if other names, dtypes or (unless `may_resize`)
        shapes changed, if parameters without a copy changed, or if values are NaN or infinite.
        """
        now = stored_tensors(model)
        untied = now.keys() & {self._tied_head} - self.parameters.keys()
        if now.keys() - untied != self.parameters.keys():
            names = ", ".join(sorted(now.keys() - untied ^ self.parameters.keys())[:5])
            raise InterventionError(f"{method} changed which parameters the model has: {names}")
        for name, copy in self.copies.items():
            same = now[name].shape == copy.shape or may_resize
            if not same or now[name].dtype != copy.dtype:
                raise InterventionError(
                    f"{method} turned {name} from {tuple(copy.shape)} {copy.dtype} "
                    f"into {tuple(now[name].shape)} {now[name].dtype}"
                )
        others = [name for name, checksum in self._checksums.items() if not _same(checksum, _checksum(now[name]))]
        if others:
            raise InterventionError(
                f"{method} changed {', '.join(others[:5])}, which its `may_change` does not name, so they cannot be "
                "restored: load the model again, and correct `may_change`"
            )
        changed = sorted({name for name, copy in self.copies.items() if not _same(copy, now[name])} | untied)
        if not changed and not may_be_none:
            raise InterventionError(f"{method} changed no weight; check its settings and its texts or edits")
        broken = [name for name in changed if not bool(torch.isfinite(now[name]).all())]
        if broken:
            raise InterventionError(f"{method} left NaN or infinity in {', '.join(broken[:5])}")
        return tuple(changed)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the modules, the parameters and the values that were copied."""
        untied = self._tied_head is not None and tied_head(self._model) is None
        for module, modules, parameters in self._places:
            module._modules.clear()
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)
        if untied:
            say_tied_(self._model, True)
        resize_(self._model, self.copies)
        for name, copy in self.copies.items():
            parameter = self.parameters[name]
            if (parameter.shape, parameter.dtype) == (copy.shape, copy.dtype):
                parameter.data.copy_(copy)
            else:
                parameter.data = copy.to(parameter.device, copy=True)


def _first_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return the names under which `named_parameters` lists `names`: a tied one has several."""
    every = {**stored_tensors(model), **dict(model.named_parameters(remove_duplicate=False))}
    unknown = [name for name in names if name not in every]
    if unknown:
        raise InterventionError(f"`may_change` names {unknown[0]}, but {type(model).__name__} has no such parameter")
    wanted = {id(every[name]) for name in names}
    return [name for name, tensor in stored_tensors(model).items() if id(tensor) in wanted]


def _checksum(parameter: Tensor) -> Tensor:
    """Return sums of the bit patterns of parts of a parameter: a change of any single weight changes one of them."""
    values = parameter.detach().reshape(-1)
    if values.data_ptr() % _WORD or values.storage_offset() * values.element_size() % _WORD:
        values = values.clone()
    whole = values.numel() * values.element_size() // _WORD * _WORD
    octets = values.view(torch.uint8)
    # Sums of 64-bit words, modulo 2**64: torch takes 20 times as long for sums of narrower ones.
    sums = [part.sum() for part in torch.split(octets[:whole].view(torch.int64), _PART)]
    return torch.stack([*sums, octets[whole:].sum()]).cpu()


def _same(before: Tensor, now: Tensor) -> bool:
    return before.shape == now.shape and torch.equal(before.to(now.device), now.detach())
