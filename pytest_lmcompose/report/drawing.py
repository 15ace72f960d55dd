"""Draw figures as SVG that uses the colours of the page, without the parts of Vega's output that nothing reads."""

from __future__ import annotations

import re

from pytest_lmcompose.report.figures import VEGA_LITE, Plot

NARROWEST = 400
"""Width of a plot in pixels, if it needs no more."""
COLOURS = 8
"""Number of the colours of series in the style sheet: --c1, --c2 and so on."""
_LABELS = {"labelColor": "var(--fg)", "titleColor": "var(--muted)", "labelFontSize": 12, "titleFontSize": 12}
_CONFIG = {
    "background": "transparent",
    "padding": {"left": 20, "right": 40, "top": 5, "bottom": 5},  # fonts differ in width
    "axis": {**_LABELS, "domainColor": "var(--muted)", "tickColor": "var(--muted)", "gridColor": "var(--line)"},
    "legend": {**_LABELS, "symbolStrokeColor": "var(--fg)"},
    "range": {"category": [f"var(--c{i})" for i in range(1, COLOURS + 1)]},
    "view": {"stroke": None},
}
_UNUSED = re.compile(
    r' (?:aria-[a-z]+|role|class|pointer-events|font-family|xmlns(?::xlink)?|version|stroke-miterlimit)="[^"]*"'
    r'| (?:opacity|stroke-width|stroke-opacity)="1"| transform="translate\(0,0\)"'
    r'| font-size="12px"| fill="var\(--fg\)"| text-anchor="start"'
)
"""What nothing reads, or the style sheet says of every text."""
_RGB = re.compile(r"rgb\((\d+), ?(\d+), ?(\d+)\)")
_EMPTY = re.compile(r'<path d="M0,0h[^"]*"[^>]*/>|<g>\s*</g>|<rect[^>]* fill="transparent"/>')
_GROUP = re.compile(r"<g>(<(?:text|path|line|rect)[^<>]*(?:/>|>[^<]*</text>))</g>")


def drawing(plot: Plot) -> str:
    """Return the SVG element of a plot."""
    import vl_convert

    spec = {**plot.spec, "width": max(NARROWEST, plot.wide)}
    svg = str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, config=_CONFIG))
    svg = re.sub(r"<[^>]*>", _smaller, svg)
    for pattern, left in ((_EMPTY, ""), (_EMPTY, ""), (_GROUP, r"\1")):
        svg = pattern.sub(left, svg)
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def _smaller(tag: re.Match[str]) -> str:
    text = re.sub(r"(\.\d)\d+", r"\1", _UNUSED.sub("", tag[0]))
    return _RGB.sub(lambda colour: "#" + "".join(f"{int(part):02x}" for part in colour.groups()), text)
