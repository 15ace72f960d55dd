"""What to try where a gate fails: one line for each kind of promise, with the page that says more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

_ADVICE = (
    (
        ("average_bits", "sparsity*", "packed_*", "overhead_bits"),
        "repeat the compression at the end, as the message says, or keep zeros by preserve_mask=true (docs/gates.md)",
    ),
    (
        ("edit_*", "perplexity_edits*"),
        "edit after the step that undid it, train longer (memit.z.steps, ft.steps), or compress less (docs/faq.md)",
    ),
    (
        ("accuracy/hazardous*", "recall_to_forget"),
        "unlearn last, or longer (rmu.max_num_batches, gd.samples); compression can bring knowledge back (docs/faq.md)",
    ),
    (
        ("perplexity*", "recall*", "accuracy/*"),
        "find the step that costs most in the interference table, and weaken it: more bits, a lower rate, fewer edits "
        "(docs/gates.md)",
    ),
)


def advice(failed: Iterable[str]) -> Iterator[str]:
    """Yield a line for each kind of metric among those whose gates failed."""
    left = set(failed)
    for globs, line in _ADVICE:
        found = {metric for metric in left if any(fnmatchcase(metric, glob) for glob in globs)}
        left -= found
        if found:
            yield f"{', '.join(sorted(found))}: {line}"
    if left:
        yield f"{', '.join(sorted(left))}: see docs/gates.md"
