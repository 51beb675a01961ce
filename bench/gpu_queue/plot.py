"""The plot: loads, makespan, p95 and longest wait of each policy as a share of FIFO's, as an SVG. Pure."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from bench.gpu_queue.summary import Row

COLUMNS = (
    ("loads", "loads"),
    ("makespan_s", "makespan"),
    ("wait_s_p95", "p95 wait"),
    ("wait_s_max", "longest wait"),
)
WIDTH, LEFT, TOP, COLUMN, BAR = 960, 190, 64, 190, 9
STYLE = (
    "text{font:12px sans-serif;fill:#222}.title{font-size:15px;font-weight:600}"
    ".quiet{fill:#666;font-size:10px}"
    ".grid{stroke:#ddd}.p0{fill:#2f6f9f}.p1{fill:#bbb}.p2{fill:#d9a441}.p3{fill:#8fb28f}"
)


def svg(rows: Sequence[Row], titles: Mapping[str, str], policies: Sequence[str], base: str) -> str:
    """The whole document; bars longer than `base`'s are cut there."""
    group = BAR * len(policies) + 14
    height = TOP + group * len(titles) + 28
    found = {(each.trace, each.policy): each for each in rows}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>Policies for one GPU</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        '<text class="title" x="16" y="24">Share of plain FIFO, less is better</text>',
    ]
    for number, policy in enumerate(policies):
        x = 330 + 150 * number
        parts += [
            f'<rect class="p{number}" x="{x}" y="14" width="10" height="10"/>',
            f'<text x="{x + 16}" y="24">{escape(policy)}</text>',
        ]
    for column, (_, label) in enumerate(COLUMNS):
        x = LEFT + COLUMN * column
        parts += [
            f'<text class="quiet" x="{x}" y="{TOP - 10}">{label}</text>',
            f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{height - 20}"/>',
        ]
    for line, (trace, title) in enumerate(titles.items()):
        y = TOP + group * line
        parts.append(f'<text x="16" y="{y + group / 2 - 2:g}">{escape(title.partition(",")[0])}</text>')
        for column, (name, _) in enumerate(COLUMNS):
            whole = getattr(found[trace, base], name)
            for number, policy in enumerate(policies):
                value = getattr(found[trace, policy], name)
                share = value / whole if whole else 1.0
                x, top = LEFT + COLUMN * column, y + BAR * number
                width = min(1.15, share) * (COLUMN - 60)
                label = f"{100 * share:.0f} %"
                parts += [
                    f'<rect class="p{number}" x="{x}" y="{top}" width="{width:.1f}" height="{BAR - 2}"/>',
                    f'<text class="quiet" x="{x + width + 3:.1f}" y="{top + BAR - 2}">{label}</text>',
                ]
    return "\n".join((*parts, "</svg>", ""))
