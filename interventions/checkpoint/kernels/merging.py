"""Merge a PEFT adapter into a model's weights without leaving a trace of peft in the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interventions.checkpoint.reading.kinds import ADAPTER, read_object
from interventions.types import InterventionError

_NAME = "default"
_TIED = (
    "{who} changes {one} alone, which is tied to {other}: merged, it would change both; untie the model's embeddings, "
    "or train the adapter without them"
)


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: Path, weight: float, who: str) -> None:
    """Add `weight` times the change that the adapter in `folder` makes to the parameters of `model`, in place.

    The change is the merged weight less the one before, whatever the kind of adapter; modules that were trained as a
    whole (`modules_to_save`) and biases count too. `who` starts the messages. Raises InterventionError.
    """
    names, own = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()} if weight != 1 else {}
    with _restored(model), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what matters in them is checked here
        tuner = _wrap(model, folder, who)
        _check_ties(names, _wrapped(model, names), who)
        _fill(tuner, folder, who)
        try:
            tuner.merge_and_unload(safe_merge=True)
        except Exception as error:  # kinds that cannot be merged, and NaN
            raise InterventionError(f"{who} cannot be merged: {_line(error)}") from error
        merged = dict(model.named_parameters(remove_duplicate=False))
    _check_equal(names, merged, who)
    for name, parameter in own.items():
        new = merged[name].detach().to(parameter.device)
        if new.shape != parameter.shape:
            raise InterventionError(
                f"{who} makes {name} of shape {tuple(new.shape)}, but the model's is {tuple(parameter.shape)}"
            )
        if weight != 1 and not torch.equal(new, before[name]):
            wide = torch.promote_types(new.dtype, torch.float32)
            new = before[name].to(wide).lerp(new.to(wide), weight)
        if merged[name] is not parameter or weight != 1:
            parameter.data.copy_(new)


def _wrap(model: nn.Module, folder: Path, who: str) -> Any:
    """Wrap the modules that the adapter changes, and return peft's model."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
        unknown = [key for key, value in read_object(folder / ADAPTER).items() if value and not hasattr(config, key)]
        if unknown:
            raise InterventionError(
                f"{who} needs a later version of peft: {folder / ADAPTER} has {unknown[0]}, which the installed one "
                "ignores; pip install --upgrade peft"
            )
        config.inference_mode = True
        tuner: Any = PeftModel(model, config, _NAME)
    except InterventionError:
        raise
    except Exception as error:  # peft raises all kinds
        raise InterventionError(f"{who} does not fit the model: {_line(error)}") from error
    if not hasattr(tuner.base_model, "merge_and_unload"):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise InterventionError(f"{who} ({kind}) cannot be merged into weights")
    return tuner


def _fill(tuner: Any, folder: Path, who: str) -> None:
    """Read the adapter's weights."""
    try:
        found = tuner.load_adapter(str(folder), _NAME, torch_device="cpu")
    except Exception as error:  # peft raises all kinds
        raise InterventionError(f"{who} does not fit the model: {_line(error)}") from error
    every = dict(tuner.named_parameters(remove_duplicate=False))
    filled = {id(parameter) for name, parameter in every.items() if name not in found.missing_keys}
    # A parameter that modules share is stored once.
    missing = [name for name in found.missing_keys if id(every.get(name)) not in filled]
    for problem, keys in (("has", found.unexpected_keys), ("lacks", missing)):
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            where = ", which have no place in the model" if problem == "has" else ""
            raise InterventionError(f"{who} {problem} {keys[0]}{more}{where}: it was made for another model")


def _wrapped(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the parameters that lie inside a wrapper of peft, with the outermost one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrappers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    found: dict[str, Any] = {}
    for name in names:
        above = (name[: match.start()] for match in re.finditer(r"\.", name))
        if (outer := next((module for module in above if module in wrappers), None)) is not None:
            found[name] = wrappers[outer]
    return found


def _check_ties(names: Mapping[str, Tensor], wrapped: Mapping[str, Any], who: str) -> None:
    """Raise InterventionError if the adapter changes only one use of a parameter that the model uses twice.

    Those that replace rows or the whole of it in every use are fine; `_check_equal` compares them.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, other in _ties(names):
        replaced = [
            isinstance(wrapped.get(one), (TrainableTokensLayer, AuxiliaryTrainingWrapper)) for one in (name, other)
        ]
        if (name in wrapped or other in wrapped) and not all(replaced):
            one = name if name in wrapped else other
            raise InterventionError(_TIED.format(who=who, one=one, other=other if one == name else name))


def _check_equal(names: Mapping[str, Tensor], merged: Mapping[str, Tensor], who: str) -> None:
    for name, other in _ties(names):
        if not torch.equal(merged[name], merged[other]):
            raise InterventionError(_TIED.format(who=who, one=name, other=other))


def _ties(names: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names of one parameter."""
    first: dict[int, str] = {}
    for name, parameter in names.items():
        if (other := first.setdefault(id(parameter), name)) != name:
            yield other, name


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the modules, attributes and config of the model that peft replaces; values of parameters stay."""
    modules = [(module, dict(vars(module))) for module in model.modules()]
    tables = [(module, dict(module._modules), dict(module._parameters), dict(module._buffers)) for module, _ in modules]
    config: Any = getattr(model, "config", None)
    settings = None if config is None else dict(vars(config))
    try:
        yield
    finally:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for module, children, parameters, buffers in tables:
            for held, kept in (
                (module._modules, children),
                (module._parameters, parameters),
                (module._buffers, buffers),
            ):
                held.clear()
                held.update(kept)  # type: ignore[arg-type]
        if settings is not None:
            vars(config).clear()
            vars(config).update(settings)


def _line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
