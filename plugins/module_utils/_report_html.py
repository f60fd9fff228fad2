# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A failover test's report as one HTML page that needs nothing else, and as JUnit XML. Text in, text out."""

from __future__ import annotations

from html import escape
from typing import Any, Mapping, Optional, Sequence

DASH = "\u2013"
ROWS_SHOWN = 32
"""A timeline shows at most this many sessions, of each kind those with the longest gaps; the table has them all."""

# Geometry of a timeline, in units of its view box.
WIDTH, LEFT, RIGHT, TOP, ROW = 1120, 118, 286, 62, 26

STYLE = """
:root{color-scheme:light dark;--bg:#f5f6f8;--card:#fff;--ink:#1b2330;--dim:#5d6879;--line:#dde2e9;
--grid:#e9edf2;--good:#14804a;--good-bg:#e2f5ea;--bad:#c02b2b;--bad-bg:#fce7e6;--down:#2f6fde;--up:#8a5cd6;
--gap:#f2a33a;--gap-bg:#fff1dc;--n1:#0e7c86;--n2:#b4530a;--zebra:#f8fafc}
@media (prefers-color-scheme:dark){:root{--bg:#11151b;--card:#1a2029;--ink:#e6eaf0;--dim:#97a3b4;--line:#2d3643;
--grid:#262e3a;--good:#4cc785;--good-bg:#163325;--bad:#ff7a72;--bad-bg:#401d1d;--down:#6da2ff;--up:#b794f6;
--gap:#f2b04a;--gap-bg:#4a3614;--n1:#35b5c0;--n2:#f08c42;--zebra:#1d242e}}*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0;letter-spacing:-.01em}
h2{font-size:19px;margin:0}p{margin:6px 0}.dim{color:var(--dim)}
.head{display:flex;gap:18px;align-items:center;justify-content:space-between;flex-wrap:wrap;margin-bottom:18px}
.pill{display:inline-block;border-radius:99px;padding:2px 12px;font-weight:650;font-size:13px;
white-space:nowrap}.big{font-size:20px;padding:7px 22px}.passed{color:var(--good);background:var(--good-bg)}
.failed{color:var(--bad);background:var(--bad-bg)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:0 0 18px}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:12px}.tile{padding:14px 16px}
.tile b{display:block;font-size:27px;line-height:1.2;font-weight:680;letter-spacing:-.02em}
.tile span{color:var(--dim);font-size:13px}.tile.bad b{color:var(--bad)}.card{padding:18px 20px;margin:0 0 18px}
.card header{display:flex;justify-content:space-between;gap:12px;align-items:center;flex-wrap:wrap;
margin-bottom:4px}.scroll{overflow-x:auto}svg{display:block;width:100%;min-width:820px;height:auto}
ul.checks{list-style:none;margin:12px 0 0;padding:0;display:grid;gap:5px 26px;
grid-template-columns:repeat(auto-fit,minmax(460px,1fr))}
ul.checks li{display:grid;grid-template-columns:20px 1fr;font-size:14px}
ul.checks small{display:block;color:var(--dim);font-size:12.5px;overflow-wrap:anywhere}
.ok{color:var(--good);font-weight:700}.no{color:var(--bad);font-weight:700}details{margin-top:12px}
summary{cursor:pointer;color:var(--dim);font-size:14px}
table{border-collapse:collapse;width:100%;font-size:13px;margin-top:8px}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;vertical-align:top}th{color:var(--dim);font-weight:600}
pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-x:auto;
background:var(--zebra);border:1px solid var(--line);border-radius:8px;padding:10px 12px;margin:8px 0}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--ink)}
svg .t{fill:var(--dim);font-size:11px}svg .w{fill:#fff;font-weight:650}svg .strong{font-weight:700}
svg .grid{stroke:var(--grid)}
svg .zebra{fill:var(--zebra)}svg .down{fill:var(--down)}svg .up{fill:var(--up)}svg .gap{fill:var(--gap-bg)}
svg .gapline{stroke:var(--gap);stroke-width:1.5}
svg .gaptext{fill:var(--ink);paint-order:stroke;stroke:var(--gap-bg);stroke-width:4px;font-size:11px;
font-weight:650}svg .dead{fill:var(--bad-bg)}
svg .deadtext{paint-order:stroke;stroke:var(--bad-bg);stroke-width:4px;fill:var(--bad);font-size:11px;
font-weight:650}svg .cut{stroke:var(--bad);stroke-width:2}svg .cuttext{fill:var(--bad);font-weight:700}
svg .moved{stroke:var(--good);stroke-width:2;stroke-dasharray:5 3}
svg .movedtext{fill:var(--good);font-weight:700}svg .goodtext{fill:var(--good);font-weight:700}
svg .badtext{fill:var(--bad);font-weight:700}svg .n1{fill:var(--n1)}svg .n2{fill:var(--n2)}
svg .mono{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:11px}
.legend{display:flex;gap:18px;flex-wrap:wrap;font-size:12.5px;color:var(--dim);margin-top:8px}
.legend i{display:inline-block;width:12px;height:10px;border-radius:2px;margin-right:6px}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""


def text(value: Any) -> str:
    """Anything as text that is safe in HTML and XML."""
    allowed = "".join(ch for ch in str(value) if ch >= " " or ch in "\n\t")
    return escape(allowed, quote=True)


def millis(value: Optional[float]) -> str:
    """``312 ms``, ``3.41 s``, or a dash."""
    if value is None:
        return DASH
    return f"{value:.0f} ms" if abs(value) < 1000 else f"{value / 1000:.2f} s"


def amount(value: int) -> str:
    """Bytes for people: ``1.4 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def order(row: Mapping[str, Any]) -> tuple[bool, bool, int, str]:
    """Sort key: the SSH session, then what was lost, then by the length of the gap."""
    return (row["name"] != "ssh", bool(row["survived"]), -(row["gap_ms"] or 0), str(row["name"]))


def silence(row: Mapping[str, Any], last: float) -> Optional[tuple[float, float]]:
    """From when to when (ms after the failure) a streaming session stood still; None: it did not."""
    if not row.get("gap_at") or row["gap_at"][1] <= row["gap_at"][0]:
        return None
    return float(row["gap_at"][0]), min(float(row["gap_at"][1]), last)


def rectangle(style: str, x: float, y: float, width: float, height: float, radius: int = 0) -> str:  # noqa: PLR0917
    """An SVG rectangle."""
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{max(width, 0):.1f}" height="{height:g}" rx="{radius}"/>'


def label(style: str, x: float, y: float, words: Any, anchor: str = "start") -> str:
    """An SVG text."""
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text(words)}</text>'


def upright(style: str, x: float, top: float, bottom: float) -> str:
    """An SVG vertical line."""
    return f'<line class="{style}" x1="{x:g}" x2="{x:g}" y1="{top:g}" y2="{bottom:g}"/>'


def chosen(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many of the sorted rows as a timeline shows: a quarter of the places at least for those that are not busy."""
    busy = [row for row in rows if row["kind"] == "busy"][: ROWS_SHOWN * 3 // 4 - 1]
    bulk = [row for row in rows if row["kind"] == "bulk"][: ROWS_SHOWN // 8]
    ssh = [row for row in rows if row["kind"] == "ssh"]
    idle = [row for row in rows if row["kind"] == "idle"][: ROWS_SHOWN - len(ssh) - len(busy) - len(bulk)]
    return [*ssh, *busy, *bulk, *idle]


def timeline(part: Mapping[str, Any]) -> str:
    """The picture of one experiment: sessions as rows, bytes over time."""
    first, last = part["window_ms"]
    rows = sorted(part["sessions"], key=order)
    hidden = len(rows) - ROWS_SHOWN
    if hidden > 0:
        rows = chosen(rows)
    plot = WIDTH - LEFT - RIGHT
    edge = LEFT + plot
    height = TOP + ROW * len(rows) + 8

    def x(time: float) -> float:
        share = (min(max(time, first), last) - first) / (last - first)
        return float(round(LEFT + share * plot, 1))

    title = f"{text(part['title'])}: bytes of each session over time"
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">']
    step = 500 if last - first <= 8000 else 1000
    for time in range(-(-first // step) * step, last + 1, step):
        out.append(upright("grid", x(time), TOP - 4, height - 8))
        if time % 1000 == 0 and x(time) < edge - 24:
            words = f"{time / 1000:+.0f} s" if time else "0"
            out.append(label("t", x(time), TOP - 8, words, "middle"))
    for words, place in (("gap", edge + 12), ("seen outside as", edge + 78), ("result", WIDTH - 58)):
        out.append(label("t", place, TOP - 8, words))

    moved = part["takeover_ms"]
    out.append(label("t", 6, 36, "virtual IPs on"))
    out.append(rectangle("n1", LEFT, 22, x(0) - LEFT, 20, 4))
    out.append(label("w", (LEFT + x(0)) / 2, 36, part["from"], "middle"))
    if moved is not None:
        out.append(rectangle("n2", x(moved), 22, edge - x(moved), 20, 4))
        out.append(label("w", (x(moved) + edge) / 2, 36, part["to"], "middle"))

    marks = [upright("cut", x(0), 16, height - 8)]
    marks.append(label("cuttext", x(0) - 6, 13, f"\u26a1 {part['from']} loses power", "end"))
    if moved is not None:
        marks.append(upright("moved", x(moved), 16, height - 8))
        words = f"virtual IPs on {part['to']} after {millis(moved)}"
        marks.append(label("movedtext", x(moved) + 6, 13, words))

    captions = []
    for number, row in enumerate(rows):
        y = TOP + number * ROW
        middle = y + ROW / 2
        line = middle + 4
        if number % 2 == 0:
            out.append(rectangle("zebra", 0, y, WIDTH, ROW))
        ssh = row["name"] == "ssh"
        out.append(label("strong" if ssh else "", 6, line, "SSH session" if ssh else row["name"]))
        still = silence(row, last)
        dead = not row["survived"]
        gap = "idle" if row["gap_ms"] is None else millis(row["gap_ms"])
        if dead:
            start = still[0] if still else 0
            out.append(rectangle("dead", x(start), y + 2, edge - x(start), ROW - 4, 3))
            words = "no answer" if row["kind"] == "idle" else "no byte passes any more"
            if part["kind"] == "failover":
                words = (row.get("reasons") or ["lost"])[0]
            if ssh and part.get("rc") is not None:
                words = f"ssh gave up after {millis(part.get('died_after_ms'))}, rc {part['rc']}"
            captions.append(label("deadtext", x(moved or 0) + 10, line, words))
            if part["kind"] == "control" and row["gap_ms"] is not None:
                gap = "endless"
        elif still:
            out.append(rectangle("gap", x(still[0]), y + 2, max(2.0, x(still[1]) - x(still[0])), ROW - 4, 3))
            if x(still[1]) - x(still[0]) > 36:
                captions.append(label("gaptext", (x(still[0]) + x(still[1])) / 2, line, gap, "middle"))
        out += bars(row, x, middle)
        out.append(label("", edge + 12, line, gap))
        out.append(label("mono", edge + 78, line, row["snat_after"] or row["snat_before"] or DASH))
        good = bool(row["survived"])
        out.append(label("goodtext" if good else "badtext", WIDTH - 58, line, "survived" if good else "lost"))
    out += [*marks, *captions, "</svg>"]
    if hidden > 0:
        out.append(f'<p class="dim">{ROWS_SHOWN} of the sessions; {hidden} more are in the table below.</p>')
    return "".join(out)


def bars(row: Mapping[str, Any], x: Any, middle: float) -> list[str]:
    """Bytes per bucket: from the far side above the row's middle, to the far side below; by the square root."""
    out = []
    for side, sign in (("down", -1), ("up", 1)):
        points = row["timeline"][side]
        sizes = sorted(size for _time, size in points)
        # Four times what is usual fills the row; the burst after a gap is cut off there.
        most = min(sizes[-1], 4 * sizes[len(sizes) // 2]) if sizes else 0
        path = []
        for time, size in points:
            high = round((min(size, most) / most) ** 0.5 * (ROW / 2 - 3), 1)
            width = max(1.5, round(x(time + 100) - x(time) - 0.8, 1))
            top = round(middle - high if sign < 0 else middle, 1)
            path.append(f"M{x(time)} {top}h{width}v{high}h-{width}z")
        if path:
            out.append(f'<path class="{side}" d="{"".join(path)}"/>')
    return out


def check_list(checks: Sequence[Mapping[str, Any]]) -> str:
    """Checks with a mark, failed ones first."""
    items = []
    for check in sorted(checks, key=lambda check: bool(check["passed"])):
        mark = '<span class="ok">✓</span>' if check["passed"] else '<span class="no">✗</span>'
        items.append(f"<li>{mark}<span>{text(check['title'])}<small>{text(check['detail'])}</small></span></li>")
    return f'<ul class="checks">{"".join(items)}</ul>'


def session_table(part: Mapping[str, Any]) -> str:
    """Every session of an experiment."""
    head = "session|survived|longest gap|answer|inside port|seen outside before|seen outside after|lines|bytes|remark"
    out = [f'<details><summary>All {len(part["sessions"])} sessions</summary><div class="scroll"><table><tr>']
    out += [f"<th>{title}</th>" for title in head.split("|")]
    out.append("</tr>")
    for row in sorted(part["sessions"], key=order):
        mark = '<td class="ok">yes</td>' if row["survived"] else '<td class="no">no</td>'
        cells = [
            millis(row["gap_ms"]),
            millis(row["answer_ms"]),
            row["port"],
            row["snat_before"] or DASH,
            row["snat_after"] or DASH,
            row["lines"],
            amount(row["bytes"]),
            "; ".join(row.get("reasons", [])),
        ]
        out.append(
            f"<tr><td>{text(row['name'])}</td>{mark}" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
        )
    out.append("</table></div></details>")
    return "".join(out)


def section(part: Mapping[str, Any]) -> str:
    """One experiment."""
    lost = sum(1 for row in part["sessions"] if not row["survived"])
    total = len(part["sessions"])
    if part["kind"] == "failover":
        line = (
            f"{total - lost} of {total} sessions survived · virtual IPs moved after {millis(part['takeover_ms'])} · "
            f"longest gap {millis(part['longest_gap_ms'])} · "
            f"resets: {DASH if part['resets'] is None else part['resets']}"
        )
        note = (
            f"{text(part['from'])} is cut off and killed in one step; {text(part['to'])} must go on with every session."
        )
    else:
        dropped = part.get("dropped") or {}
        line = (
            f"{lost} of {total} sessions died, as they must · virtual IPs moved after {millis(part['takeover_ms'])} · "
            f"rule [5] +{dropped.get('invalid', DASH)}, policy +{dropped.get('policy', DASH)} packets"
        )
        note = "The same failure with replication off. If the sessions lived on, the test above would prove nothing."
    word = {"passed": "passed", "failed": "failed"}[part["verdict"]]
    if part["kind"] == "control" and part["verdict"] == "passed":
        word = "passed: the sessions died"
    out = [
        '<section class="card"><header>',
        f'<div><h2>{text(part["title"])}</h2><p class="dim">{note}</p></div>',
        f'<span class="pill {part["verdict"]}">{word}</span></header><p>{text(line)}</p>',
        f'<div class="scroll">{timeline(part)}</div>',
        '<div class="legend"><span><i style="background:var(--down)"></i>bytes to the inside</span>'
        '<span><i style="background:var(--up)"></i>bytes to the outside</span>'
        '<span><i style="background:var(--gap-bg);outline:1px solid var(--gap)"></i>silence</span>'
        "<span>bars: bytes per 0.1 s, square root, scaled per row</span></div>",
        check_list(part["checks"]),
    ]
    if part.get("lines"):
        body = "\n".join(f"({where})# {what}" for where, what in part["lines"].items())
        out.append(f"<details><summary>The SSH session in the tables</summary><pre>{text(body)}</pre></details>")
    out.append(session_table(part))
    out.append("</section>")
    return "".join(out)


def tiles(report: Mapping[str, Any]) -> str:
    """The numbers that matter."""
    sessions = report["sessions"]
    lost = sum(1 for row in sessions if not row["survived"])
    failovers = report["failovers"]
    controls = report["negative_controls"]
    resets = [part["resets"] for part in failovers]
    known = bool(resets) and None not in resets
    died = [part.get("died_after_ms") for part in controls]
    out = [
        (
            f"{lost} of {len(sessions)}",
            f"sessions lost in {len(failovers)} failover{'' if len(failovers) == 1 else 's'}",
            lost > 0 or not sessions,
        ),
        (millis(report["takeover"]["worst_vip_ms"]), "until the virtual IPs had moved (worst)", False),
        (millis(report["takeover"]["longest_gap_ms"]), "longest silence of any session", False),
        (str(sum(resets)) if known else DASH, "resets of the sessions, at any place", not known or sum(resets) > 0),
        (
            millis(died[-1]) if died and died[-1] is not None else DASH,
            "until SSH died without replication (control)",
            not controls or any(part["verdict"] != "passed" for part in controls),
        ),
    ]
    return "".join(
        f'<div class="tile{" bad" if bad else ""}"><b>{text(value)}</b><span>{text(title)}</span></div>'
        for value, title, bad in out
    )


def html(report: Mapping[str, Any]) -> str:
    """The whole page."""
    about = report["about"]
    parts = sorted(
        [*report["failovers"], *report["negative_controls"]], key=lambda part: (part["run"], part["failed_at"] or 9e99)
    )
    verdict = report["verdict"]
    headline = "PASSED" if verdict == "passed" else "FAILED"
    facts = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in about.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Failover test {headline.lower()}</title><style>{STYLE}</style></head><body><main>"
        '<div class="head"><div><h1>Failover test</h1>'
        f'<p class="dim">{text(about.get("when", ""))} · a firewall pair that must lose no established session</p>'
        "</div>"
        f'<span class="pill big {verdict}">{headline}</span></div>'
        f'<div class="tiles">{tiles(report)}</div>'
        f'<section class="card"><header><h2>The run</h2></header>{check_list(report["checks"])}</section>'
        + "".join(section(part) for part in parts)
        + f'<section class="card"><header><h2>About</h2></header><table>{facts}</table>'
        '<p class="dim">The evidence behind every line is beside this file, in <code>evidence/</code>; the same data '
        "for programs is in <code>report.json</code> and <code>junit.xml</code>.</p></section></main></body></html>\n"
    )


def junit(report: Mapping[str, Any]) -> str:
    """Every check as a test case (the common JUnit XML dialect)."""
    suites = [("failover-test", report["checks"])]
    for part in [*report["failovers"], *report["negative_controls"]]:
        suites.append((f"run {part['run']}: {part['title']}", part["checks"]))
    total = sum(len(checks) for _name, checks in suites)
    bad = sum(1 for _name, checks in suites for check in checks if not check["passed"])
    out = [
        f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="failover-test" tests="{total}" failures="{bad}">'
    ]
    for name, checks in suites:
        failures = sum(1 for check in checks if not check["passed"])
        out.append(
            f'  <testsuite name="{text(name)}" tests="{len(checks)}" failures="{failures}" errors="0" skipped="0">'
        )
        for check in checks:
            head = f'    <testcase classname="{text(name)}" name="{text(check["title"])}">'
            if check["passed"]:
                out.append(f"{head}<system-out>{text(check['detail'])}</system-out></testcase>")
            else:
                out.append(f'{head}<failure message="{text(check["detail"])}"/></testcase>')
        out.append("  </testsuite>")
    out.append("</testsuites>\n")
    return "\n".join(out)
