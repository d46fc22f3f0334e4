"""Write what was measured: the goals and all figures into RESULTS.md, the most telling ones into results.svg."""
# pyright: basic, reportMissingImports=false
# Matplotlib is in the `bench` group only.

import math
import os
import platform
import sqlite3
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from stand import HOME, LONG_FILES, ROWS, TREES, versions

RESULTS = Path(__file__).with_name("RESULTS.md")
PICTURE = Path(__file__).with_name("results.svg")
TRIED = "## What was tried"  # written by hand; a new run keeps it
Figures = dict[str, dict[str, list[float]]]
OURS = ("fs_server", "api_server", "db_server", "pg_server", "bare serving.py")

BARE, FS, DB, REFERENCE, DBHUB = "bare SDK", "fs_server", "db_server", "reference fs", "DBHub"
SERVERS = {"fs_server": 0.6, "api_server": 0.6, "db_server": 0.8, "pg_server": 0.8}  # a small call, of the bare SDK's
CROWD, ENDLESS = "quick call among 64 slow ones", "list_tables among 8 endless statements"
STEADY = "memory after 10,000 calls, of that after 2,000"
GOALS: list[tuple[str, str, str | float, float]] = [  # work, ours, next to what, the ratio at most
    *(("small call", name, BARE, most) for name, most in SERVERS.items()),
    *(("call, 32 at a time", name, BARE, 0.5) for name in SERVERS),
    *(("start", name, BARE, 0.9) for name in SERVERS),
    ("find, 10,000 files", FS, "find", 1.5),
    ("find, 10,000 files", FS, REFERENCE, 1 / 40),
    ("search, 10,000 files", FS, "grep -rn", 2),
    ("10 MB text", FS, REFERENCE, 0.4),
    ("tree, bytes", FS, REFERENCE, 0.1),
    ("10 rows", DB, DBHUB, 1),
    ("1,000 rows", DB, DBHUB, 0.7),
    ("100,000 rows", DB, DBHUB, 0.5),
    ("1,000 rows, bytes", DB, DBHUB, 0.5),
    *(("memory after start, MiB", name, BARE, 1.05) for name in SERVERS),
    *(("memory after start, MiB", name, DBHUB, 0.5) for name in ("db_server", "pg_server")),
    *((STEADY, name, 1, 1.01) for name in SERVERS),  # what is a number is a limit
    *((CROWD, name, 50, 1) for name in ("fs_server", "api_server")),
    *((ENDLESS, name, 100, 1) for name in ("db_server", "pg_server")),
]

SMALL = [
    "start",
    "memory after start, MiB",
    "list of tools, bytes",
    "small call",
    "slowest of 50",
    "call, 32 at a time",
]
# Tables of figures: works with the same subjects.
TABLES = {
    "Every server": SMALL,
    "Files": ["find, 10,000 files", "search, 10,000 files", "10 MB text", "10 MB text, bytes", "tree", "tree, bytes"],
    "Rows": ["10 rows", "1,000 rows", "1,000 rows, bytes", "100,000 rows", "100,000 rows, bytes"],
    "APIs": ["answer from the cache", "answer from the API"],
    "Many calls": [CROWD, ENDLESS, STEADY],
}
GROWTH = [  # the works whose names differ in one number
    ("find, {} files", TREES),
    ("search, {} files", TREES),
    ("tail, {} MB", LONG_FILES),
    ("{} rows", ROWS),
    ("HTTP, {} clients", (1, 4, 16, 64)),
]


def number(figure: float) -> str:
    """Three digits, or the whole number."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def cell(spans: Sequence[float] | None) -> str:
    """The median and the range."""
    if not spans:
        return ""
    least, most = number(min(spans)), number(max(spans))
    return number(statistics.median(spans)) + (f" ({least}–{most})" if least != most else "")


def row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def goals(figures: Figures) -> list[str]:
    """The table of goals."""
    out = [row("work", "ours", "next to", "ratio", "at most", ""), "|---|---|---|---:|---:|---|"]
    for work, ours, other, most in GOALS:
        subjects = figures.get(work, {}) | ({} if isinstance(other, str) else {str(other): [other]})
        if ours in subjects and str(other) in subjects:
            ratio = statistics.median(subjects[ours]) / statistics.median(subjects[str(other)])
            beside = f"{other}: {cell(subjects[other])}" if isinstance(other, str) else number(other)
            verdict = "" if ratio <= most else "**missed**"
            out.append(row(work, f"{ours}: {cell(subjects[ours])}", beside, f"{ratio:.3g}", f"{most:.3g}", verdict))
    return out


def table(figures: Figures, works: list[str]) -> list[str]:
    """The figures of some works, a line for each subject."""
    works = [work for work in works if work in figures]
    subjects = dict.fromkeys(name for work in works for name in figures[work])
    lines = [row(name, *(cell(figures[work].get(name)) for work in works)) for name in subjects]
    return [row("", *works), f"|---|{'---:|' * len(works)}", *lines]


def slope(points: dict[int, float]) -> float:
    """Of the line through the logarithms: 1 is growth in proportion, 0 none."""
    return statistics.linear_regression([math.log(x) for x in points], [math.log(y) for y in points.values()]).slope


def growth(figures: Figures) -> list[str]:
    """How the time grows with the size: a table for each work, the slope in the last column."""
    out: list[str] = []
    for work, sizes in GROWTH:
        found = {size: figures[name] for size in sizes if (name := work.format(f"{size:,}")) in figures}
        out += [row(work.format("…"), *(f"{size:,}" for size in found), "slope"), f"|---|{'---:|' * (len(found) + 1)}"]
        for name in dict.fromkeys(name for subjects in found.values() for name in subjects):
            points = {size: statistics.median(subjects[name]) for size, subjects in found.items() if name in subjects}
            cells = (cell(subjects.get(name)) for subjects in found.values())
            out.append(row(name, *cells, f"{slope(points):.2f}" if len(points) > 1 else ""))
        out.append("")
    return out


def write(figures: Figures, missing: list[str], *, quick: bool) -> None:
    """Write both files; after a quick run only print, and draw into the ignored folder."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t: ")
    packages = ", ".join(f"{name} {version(name)}" for name in ("mcp", "aiosqlite", "asyncpg", "httpx"))
    lines = [
        "# Results",
        "",
        "Written by `python3 benchmarks/bench.py`; what it does is in its first lines. All is of one run. A figure is a"
        " median, with the range of what was measured in brackets: milliseconds, where nothing else is said.",
        "",
        f"- {platform.system()} {platform.machine()}, {os.cpu_count()} processors ({cpu}), {time.strftime('%Y-%m-%d')}",
        f"- ours: Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {packages}",
        f"- peers: {', '.join(versions())}",
        *(f"- not measured: {line}" for line in missing),
        "",
        "![The most telling figures, ours next to the others](results.svg)",
        "",
        "## Next to the goals",
        "",
        *goals(figures),
    ]
    for title, works in TABLES.items():
        lines += ["", f"## {title}", "", *table(figures, works)]
    lines += [
        "",
        "## How cost grows",
        "",
        "The slope is that of the logarithms: 1 is growth in proportion to the size, 0 is none.",
        "",
    ]
    text = "\n".join([*lines, *growth(figures)])
    if quick:
        print(text)
        draw(figures, HOME / "results.svg")
    else:
        RESULTS.write_text(f"{text}\n{TRIED}{RESULTS.read_text().partition(TRIED)[2]}")
        draw(figures, PICTURE)


# -------------------------------------------------------------------------------------------------------- picture

PANELS = (  # a line: what the ratios are to, and the works
    (BARE, ("small call", "call, 32 at a time", "start", "memory after start, MiB")),
    (FS, ("find, 10,000 files", "search, 10,000 files", "10 MB text", "tree, bytes")),
    (DB, ("10 rows", "1,000 rows", "100,000 rows", "1,000 rows, bytes")),
)
COLOURS = {"ours": "#0969da", "peers": "#afb8c1", "plain tools, without MCP": "#d8b48f"}
PLAIN = ("find", "grep -rn", "sqlite3 + json.dumps")


def draw(figures: Figures, path: Path) -> None:
    """A panel for each work, with bars as long as the medians, and their ratios to one of them."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    # Text stays text, the same figures make the same file, and its own white ground serves dark pages, too.
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 9}
    heights = {"height_ratios": (9, 4, 5)}
    page, axes = pyplot.subplots(3, 4, figsize=(12, 6.6), layout="constrained", facecolor="white", gridspec_kw=heights)
    for (base, works), line in zip(PANELS, axes, strict=True):
        subjects = list(dict.fromkeys(name for work in works for name in figures.get(work, {})))
        for work, panel in zip(works, line, strict=True):
            unit = "kB" if "bytes" in work else "MiB" if "MiB" in work else "ms"
            bars = {name: statistics.median(spans) for name, spans in figures.get(work, {}).items()}
            for name, figure in bars.items():
                kind = "ours" if name in OURS else "plain tools, without MCP" if name in PLAIN else "peers"
                place = len(subjects) - subjects.index(name)
                panel.barh(place, figure, color=COLOURS[kind], height=0.72)
                text = f"{number(figure / 1000 if unit == 'kB' else figure)} {unit}"
                ratio = f" · {number(figure / bars[base])}×" if name != base and base in bars else ""
                panel.annotate(text + ratio, (figure, place), (4, 0), textcoords="offset points", va="center")
            panel.set(xlim=(0, max(bars.values(), default=1) * 1.9), ylim=(0.4, len(subjects) + 0.6))
            panel.set_title(
                work.partition(", MiB")[0].replace(", bytes", ": answer"), loc="left", fontweight="bold", fontsize=10
            )
            panel.set_yticks(range(len(subjects), 0, -1), subjects)
            panel.tick_params(length=0, labelbottom=False, labelleft=panel is line[0])
            panel.spines[["top", "right", "bottom"]].set_visible(False)
    patches = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    title = "shorter is better; the ratios are to the first bar"
    page.legend(handles=patches, title=title, loc="outside lower center", ncols=3, frameon=False)
    page.savefig(path, metadata={"Date": None})
