"""Find the routed experts of a block: fused ones, whose parameters stack the weights of all, and lists of modules.

What the layers of an expert read, and which way round they are stored, is found by running the module on a few
tokens, not by names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interventions.compress.kernels.expert_proof import ExpertProof
from interventions.early_exit import replaced_forward
from interventions.layouts import Role
from interventions.modes import keep_modes
from interventions.parts import PartsWatch, Place, Product, plain_experts, stacks, stacks_under
from interventions.structure import Linear, LinearGroup, Memory, Part, first_output, is_linear
from interventions.types import InterventionError

TOKENS = 4
Form = Literal["routed", "whole", "list"]
"""How the module is called: with tokens, chosen experts and their weights; with tokens alone; or expert by expert."""


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one block."""

    path: str
    """Path inside the block of the module that holds the experts, without their number."""
    module: nn.Module
    """The module to call."""
    form: Form
    count: int
    width: int
    """Width of a token."""
    router: Linear | None
    """The layer that chooses the experts; no method changes it. None if there is no linear one."""
    groups: tuple[LinearGroup, ...]
    """First the groups that read the tokens, expert by expert, then the others."""


def find_experts(block_name: str, block: nn.Module) -> list[ExpertLayer]:
    """Return the layers of routed experts in a block, in order; those that cannot be run by themselves are left out."""
    if not any(stacks(module) or isinstance(module, nn.ModuleList) for module in block.modules()):
        return []
    found: list[ExpertLayer] = []
    with keep_modes(block), plain_experts(block), torch.no_grad():
        for path, module in _innermost_first(block):
            inside = any(layer.path.startswith(path) or path.startswith(layer.path) for layer in found)
            if inside or not path:
                continue
            layer = _fused(block_name, block, path, module) or _listed(block_name, block, path, module)
            if layer is not None and layer.router is not None:  # without, heads of a mixer, not experts
                found.append(layer)
    order = list(dict(block.named_modules()))
    return sorted(found, key=lambda layer: order.index(layer.path))


def memories(block_name: str, block: nn.Module, layers: Sequence[ExpertLayer]) -> tuple[Memory, ...]:
    """Return the output layers of each layer of experts, with the module that puts out their weighted sum."""
    found = []
    for layer in layers:
        inside = layer.path.rpartition(".")[0] if layer.form == "list" else layer.path
        outputs = tuple(group.linears[0] for group in layer.groups if group.role == "mlp_out")
        module = block.get_submodule(inside) if layer.form == "list" else layer.module
        found.append(Memory(f"{block_name}.{inside}", module, outputs, routed=True))
    return tuple(found)


def router_parameters(block: nn.Module, layer: ExpertLayer) -> list[nn.Parameter]:
    """Return the parameters of the module beside the experts that chooses them, its scales and biases among them."""
    router = next((n for n, m in block.named_modules() if layer.router is not None and m is layer.router.module), "")
    parts = router.split(".") if router else []
    for size in range(1, len(parts) + 1):
        scope = ".".join(parts[:size])
        if not f"{layer.path}.".startswith(f"{scope}."):
            return list(block.get_submodule(scope).parameters())
    return [] if layer.router is None else list(layer.router.module.parameters())


@contextmanager
def every_token(block: nn.Module, layers: Sequence[ExpertLayer], method: str) -> Iterator[Callable[[], bool]]:
    """Let every expert of the layers run on every token as well, without effect on the output.

    Yields a function that tells whether such a run is going on. Raises InterventionError for a layer whose experts
    cannot be run one by one.
    """
    extra = False

    def around(layer: ExpertLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
        own = layer.module.forward if layer.form == "routed" else None

        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal extra
            output = forward(*arguments, **keywords)
            hidden = (arguments or tuple(keywords.values()))[0].reshape(-1, layer.width)
            extra = True
            for expert in range(layer.count):
                _call(layer.module if own is None else own, layer.form, hidden, expert)
            extra = False
            return output

        return run

    with ExitStack() as stack:
        for layer in layers:
            if layer.form == "whole":
                raise InterventionError(
                    f"{method}: {layer.groups[0].linears[0].parameter_name}: its module chooses the experts itself, so "
                    "they cannot all get every token: set calibrate_all_experts=false"
                )
            called = layer.module if layer.form == "routed" else block.get_submodule(layer.path.rpartition(".")[0])
            stack.enter_context(replaced_forward(called, around(layer, called.forward)))
        yield lambda: extra


def _innermost_first(block: nn.Module) -> list[tuple[str, nn.Module]]:
    modules = list(block.named_modules())
    return sorted(modules, key=lambda pair: -pair[0].count(".") - bool(pair[0]))


class _Trace(PartsWatch):  # type: ignore[no-untyped-call]
    """Records the products with parts of parameters, and the biases that are added to them."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.products: list[Product] = []
        self.biases: dict[str, str] = {}
        self._vectors = {p.untyped_storage().data_ptr(): name for name, p in parameters.items() if p.dim() == 2}
        super().__init__(parameters, self.products.append)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            first, second = arguments[:2]
            for product, vector in ((first, second), (second, first)):
                name = self._vectors.get(vector.untyped_storage().data_ptr()) if isinstance(vector, Tensor) else None
                for seen in self.products if name is not None else ():
                    if seen.output.data_ptr() == product.data_ptr():
                        self.biases[seen.parameter] = str(name)
        return super().__torch_dispatch__(function, types, arguments, keywords)


def _fused(block_name: str, block: nn.Module, path: str, module: nn.Module) -> ExpertLayer | None:
    parameters = stacks_under(module)
    owners = sorted({name.rpartition(".")[0] for name in parameters})
    if not parameters:
        return None
    widths = sorted({size for p in parameters.values() for size in p.shape[-2:]})
    for form in ("routed", "whole"):
        for width in widths:
            trace = _Trace(parameters)
            hidden = _tokens(next(iter(parameters.values())), width)
            try:
                with trace:
                    _call(module, form, hidden, 0)
            except Exception:  # a wrong guess how to call a module of any kind
                continue
            stages = _stages(trace.products, width)
            if stages is not None:
                where = path if len(owners) > 1 or owners == [""] else f"{path}.{owners[0]}"
                return _layer(block_name, block, path, module, form, width, where, _parts(module, trace, stages))
    return None


def _call(module: Any, form: Form, hidden: Tensor, expert: int) -> Tensor:
    if form == "whole":
        return first_output(module(hidden.unsqueeze(0)))
    if form == "list":
        return first_output(module[expert](hidden))
    chosen = torch.full((len(hidden), 1), expert, device=hidden.device)
    return first_output(module(hidden, chosen, torch.ones_like(chosen, dtype=hidden.dtype)))


def _tokens(like: Tensor, width: int) -> Tensor:
    tokens = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(0))
    return tokens.to(like.device, like.dtype)


def _stages(products: Sequence[Product], width: int) -> tuple[list[Product], list[Product]] | None:
    """Return the products of one expert that read its tokens, and the one or more that read what those make."""
    if not products or products[0].inputs.shape[1] != width:
        return None
    index = products[0].place.index
    by_input: dict[tuple[int, ...], list[Product]] = {}
    for product in products:
        if product.place.index == index:
            key = (product.inputs.data_ptr(), *product.inputs.shape)
            by_input.setdefault(key, []).append(product)
    stages = list(by_input.values())
    return (stages[0], stages[1]) if len(stages) == 2 else None


def _parts(
    module: nn.Module, trace: _Trace, stages: Sequence[Sequence[Product]]
) -> list[list[tuple[str, nn.Module, Part]]]:
    """Return, by stage, name of the owner, owner and first part of each of the parameters."""
    found = []
    for stage in stages:
        parts = []
        for product in stage:
            owner, _, name = product.parameter.rpartition(".")
            bias = trace.biases.get(product.parameter)
            bias = None if bias is None or bias.rpartition(".")[0] != owner else bias.rpartition(".")[2]
            parts.append((owner, module.get_submodule(owner), Part(name, product.place, bias)))
        found.append(parts)
    return found


def _layer(
    block_name: str,
    block: nn.Module,
    path: str,
    module: nn.Module,
    form: Form,
    width: int,
    where: str,
    stages: Sequence[Sequence[tuple[str, nn.Module, Part]]],
) -> ExpertLayer:
    counts = [part.place.count for stage in stages for _, _, part in stage]
    count = min(counts)  # some routers know experts besides that do nothing
    linears: list[list[tuple[Linear, ...]]] = []
    for stage in stages:
        experts = []
        for expert in range(count):
            own = []
            for owner, holder, part in stage:
                full = ".".join(name for name in (block_name, path, owner, part.parameter, str(expert)) if name)
                own.append(
                    Linear(full, holder, part._replace(place=Place(expert, part.place.count, part.place.transposed)))
                )
            experts.append(tuple(own))
        linears.append(experts)
    holders = [f"{path}.{owner}".rstrip(".") for owner, _, _ in (*stages[0], *stages[1])]
    router = _router(block_name, block, path, holders, max(counts), wider=form == "routed")
    return ExpertLayer(path, module, form, count, width, router, _groups(linears, where, module, form, width))


def _groups(
    linears: Sequence[Sequence[tuple[Linear, ...]]], where: str, module: nn.Module, form: Form, width: int
) -> tuple[LinearGroup, ...]:
    """Return the groups of all experts; `linears` has those of each expert by stage."""
    proof = ExpertProof(module, lambda module, hidden: _call(module, form, hidden, 0), width)
    roles: tuple[Role, Role] = ("mlp_in", "mlp_out")
    groups = []
    for role, experts in zip(roles, linears, strict=True):
        for number, own in enumerate(experts):
            # The layer before the output whose last rows may feed it: up, also behind gate in one.
            declared = linears[0][number][-1] if role == "mlp_out" else None
            groups.append(LinearGroup(role, own, declared, None, proof, expert=f"{where}.{number}", routed=True))
    proof.groups = tuple(groups) if form == "whole" else (groups[0], groups[len(linears[0])])
    return tuple(groups)


def _router(
    block_name: str, block: nn.Module, path: str, holders: Sequence[str], count: int, *, wider: bool = False
) -> Linear | None:
    """Return the layer with one output per expert that stands nearest to the experts, outside of their `holders`.

    With `wider`, a layer with some more outputs if there is none: for shared experts, or for none.
    """
    scopes = [path]
    while scopes[-1]:
        scopes.append(scopes[-1].rpartition(".")[0])
    found: list[tuple[int, Linear]] = []
    for scope in scopes:
        for name, module in block.get_submodule(scope).named_modules(prefix=scope):
            weight = getattr(module, "weight", None)
            outside = not any(f"{name}.".startswith(f"{holder}.") for holder in holders)
            if outside and isinstance(weight, Tensor) and weight.dim() == 2:
                found.append((len(weight), Linear(f"{block_name}.{name}", module)))
    sizes = range(count, 2 * count if wider else count + 1)
    return next((router for size in sizes for outputs, router in found if outputs == size), None)


def _listed(block_name: str, block: nn.Module, path: str, module: nn.Module) -> ExpertLayer | None:
    """Return the layer of a list of equal modules beside a router with one output each."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(child) for child in module}) > 1:
        return None
    router = _router(block_name, block, path, [path], len(module))
    names = [name for name, child in module[0].named_modules() if is_linear(child)]
    shapes = {tuple((name, p.shape) for name, p in child.named_parameters()) for child in module}
    if router is None or not names or len(shapes) > 1:
        return None
    for width in sorted({Linear("", module[0].get_submodule(name)).in_features for name in names}):
        stages = _stages_of_modules(module[0], names, width)
        if stages is not None:
            break
    else:
        return None
    linears = [
        [
            tuple(
                Linear(".".join(n for n in (block_name, path, str(i), name) if n), child.get_submodule(name))
                for name in stage
            )
            for i, child in enumerate(module)
        ]
        for stage in stages
    ]
    groups = _groups(linears, path, module, "list", width)
    return ExpertLayer(path, module, "list", len(module), width, router, groups)


def _stages_of_modules(expert: nn.Module, names: Sequence[str], width: int) -> list[list[str]] | None:
    """Return the linear layers of an expert by the input that they share, if there are two inputs."""
    seen: list[tuple[Tensor, list[str]]] = []

    def see(name: str, x: Tensor) -> None:
        for known, readers in seen:
            if known is x:
                readers.append(name)
                return
        seen.append((x, [name]))

    handles = [
        expert.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name in names
    ]
    try:
        expert(_tokens(next(expert.parameters()), width))
    except Exception:  # a wrong guess how to call a module of any kind
        return None
    finally:
        for handle in handles:
            handle.remove()
    return [readers for _, readers in seen] if len(seen) == 2 else None
