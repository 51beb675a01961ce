"""The plot: solved by each arm with its 95 % interval, as an SVG of its own. Pure."""

from xml.sax.saxutils import escape

from bench.loop_quality.summary import ArmSummary, Summary

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 640, 110, 190, 56, 48, 22
TICKS = 5
STYLE = (
    "text{font:13px sans-serif;fill:#222}.title{font-size:15px;font-weight:600}"
    ".quiet{fill:#666;font-size:11px}.grid{stroke:#ddd}.whisker{stroke:#222;stroke-width:1.5}.bar{fill:#9db8cc}.loop{fill:#2f6f9f}"
)


def svg(found: Summary) -> str:
    """The whole document."""
    height = TOP + ROW * len(found.arms) + 44
    top = _round_up(max((arm.share.high or 0) for arm in found.arms.values()))
    setup = found.setup
    title = f"MBPP sanitized {setup.problems}, solved of {found.problems}: {setup.model}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="16" y="28">{escape(title)}</text>',
        *_axis(top, TOP + ROW * len(found.arms)),
    ]
    for row, (name, arm) in enumerate(found.arms.items()):
        parts += _bar(name, arm, TOP + ROW * row + ROW // 2, top)
    parts.append(
        f'<text class="quiet" x="{LEFT}" y="{height - 8}">share solved; whiskers: 95 %, bootstrap</text>'
    )
    return "\n".join((*parts, "</svg>", ""))


def _axis(top: float, bottom: int) -> list[str]:
    parts = []
    for tick in range(TICKS + 1):
        x = _x(top * tick / TICKS, top)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(
            f'<text class="quiet" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{100 * top * tick / TICKS:g} %</text>"
        )
    return parts


def _bar(name: str, arm: ArmSummary, middle: int, top: float) -> list[str]:
    low, value, high = (_x(part or 0, top) for part in (arm.share.low, arm.share.value, arm.share.high))
    kind = "bar loop" if name == "loop" else "bar"
    start, right = middle - BAR // 2, WIDTH - RIGHT + 14
    whisker = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10"
    cost = f"{arm.tokens:.0f} tokens, {arm.calls:.1f} calls"
    return [
        f'<text x="{LEFT - 10}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>',
        f'<rect class="{kind}" x="{LEFT}" y="{start}" width="{value - LEFT:.1f}" height="{BAR}"/>',
        f'<path class="whisker" d="{whisker}" fill="none"/>',
        f'<text x="{right}" y="{middle - 2}">{arm.solved} solved</text>',
        f'<text class="quiet" x="{right}" y="{middle + 13}">{cost}</text>',
    ]


def _x(share: float, top: float) -> float:
    return LEFT + (WIDTH - RIGHT - LEFT) * share / top


def _round_up(share: float) -> float:
    """The next end of an axis that has round ticks."""
    return next((end for end in (0.05, 0.1, 0.2, 0.25, 0.5) if share <= end), 1.0)
