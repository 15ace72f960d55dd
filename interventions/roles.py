"""From the wiring of a block to its groups of linear layers: roles, scopes and what makes a group's input.

A layer that reaches the block's output, and that other layers feed, is an `out`; the layers that feed it, and those
before them, are its `in`. Where tokens are mixed in between, it is attention if a softmax ran, and a mixer if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from interventions.layouts import ROLES, Role
from interventions.structure import Linear
from interventions.wiring import Site, Wiring

_OUT = {"attention": "attention_out", "mixer": "mixer_out", "mlp": "mlp_out"}
_IN = {"attention": "attention_in", "mixer": "mixer_in", "mlp": "mlp_in"}


class FoundGroup(NamedTuple):
    """Linear layers that share an input and a role."""

    role: Role
    linears: tuple[Linear, ...]
    declared: nn.Module | None
    """The operation that may make the input."""
    scope: str | None
    """Path inside the block of the module that holds the group and what it feeds."""


def find_groups(wiring: Wiring) -> tuple[list[FoundGroup], dict[str, str]]:
    """Return the groups in the order of their calls, and the layers that no group has, with the reason."""
    roles, left = _roles(wiring)
    members: dict[tuple[tuple[int, ...], Role], list[Site]] = {}
    for site in wiring.sites:
        if site in roles:
            members.setdefault((site.read, roles[site]), []).append(site)
    found = []
    for (read, role), sites in members.items():
        linears = tuple(site.linear for site in sites)
        scope = None if role.endswith("_out") else _scope(wiring, sites, roles)
        others = any(site.read == read and site not in sites for site in wiring.sites)
        declared = _made_by_linear(wiring, sites, role) if role.endswith("_out") else None
        if declared is None and not role.endswith("_out") and not others:
            declared = wiring.norm_before(sites[0])
        found.append(FoundGroup(role, linears, declared, scope))
    return found, left


def _roles(wiring: Wiring) -> tuple[dict[Site, Role], dict[str, str]]:
    families = {site: _family(wiring, site) for site in wiring.ends if not _chooses(wiring, site)}
    roles: dict[Site, Role] = {site: _OUT[family] for site, family in families.items()}  # type: ignore[misc]
    left = {}
    for site in wiring.sites:
        if site in roles:
            continue
        if site.reaches_end:
            family = "mixer" if site.ends else "mlp"
            beside = [families[end] for end in families if _common([site.path, end.path]) != ""]
            family = beside[0] if beside else family
            if not site.ends and site.linear.out_features < site.linear.in_features:
                left[site.linear.name] = "it only weights what other layers make"
                continue
        else:
            reached = {families[end] for end in _reached(site) if end in families}
            if not reached:
                left[site.linear.name] = "what it puts out reaches no other layer"
                continue
            family = next(family for family in _OUT if family in reached)
        roles[site] = _IN[family]  # type: ignore[assignment]
    return roles, left


def _chooses(wiring: Wiring, end: Site) -> bool:
    """Return whether a layer is the end of a router or gate: too narrow for the hidden state, or a part of it."""
    wide = max(site.linear.out_features for site in wiring.ends)
    return wide % end.linear.out_features != 0 or end.linear.out_features < wide / 8


def _family(wiring: Wiring, end: Site) -> str:
    before = wiring.feeding(end)
    inner = {site for site in wiring.sites if not site.reaches_end and end in _reached(site)}
    if not any(site.feeds[end] for site in before) and not any(
        mixed for site in inner for other, mixed in site.feeds.items() if other in inner
    ):
        return "mlp"
    mixing = [(other.order, site.order) for site in inner for other, mixed in site.feeds.items() if mixed]
    last = max(reader for reader, _ in mixing if reader <= end.order)
    first = min(order for reader, order in mixing if reader == last)
    return "attention" if any(site.attends for site in wiring.sites if first < site.order <= last) else "mixer"


def _reached(site: Site) -> set[Site]:
    """Return the ends that a layer reaches by way of layers that are none."""
    found: set[Site] = set()
    waiting, seen = [site], {site}
    while waiting:
        for other in waiting.pop().feeds:
            if other.reaches_end:
                found.add(other)
            elif other not in seen:
                seen.add(other)
                waiting.append(other)
    return found


def _scope(wiring: Wiring, sites: Sequence[Site], roles: dict[Site, Role]) -> str | None:
    family = roles[sites[0]].partition("_")[0]
    ends = {end for site in sites for end in _reached(site) if roles.get(end) == f"{family}_out"}
    path = _common([site.path for site in (*sites, *ends)])
    return path if path in wiring.called and path else None


def _common(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that contains the layers."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _made_by_linear(wiring: Wiring, sites: Sequence[Site], role: Role) -> nn.Module | None:
    """Return the linear layer whose last outputs may feed the group channel by channel."""
    width = sites[0].linear.in_features
    before = [site for site in wiring.feeding(sites[0]) if site.linear.out_features % width == 0]
    doubling = [site for site in before if all(wiring.runs.doubles(site, end) for end in sites)]
    if doubling:
        return doubling[-1].linear.module
    last = wiring.feeding(sites[0])[-1]
    # Other implementations fold into the values' layer wherever its shape allows.
    return last.linear.module if role == "attention_out" and last.linear.out_features == width else None


assert set(_OUT.values()) | set(_IN.values()) == set(ROLES)
