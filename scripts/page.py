"""The report as one HTML page without dependencies, as Markdown, as a LaTeX table and as CSV."""

import csv
import io
import json
import re
import string
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote

import matplotlib
from matplotlib.figure import Figure

from scripts.plotting import COLOURS

TEMPLATE = string.Template(Path(__file__).with_name("page.html").read_text())
COLUMNS = "dataset role teacher student method trial seed state reason epochs of last best best_epoch macro_f1 seconds"
COLUMNS = f"{COLUMNS} together peak_mib params image_size device commit sha256 folder command".split()
PLAIN = {"svg.fonttype": "none", "svg.hashsalt": "report", "savefig.transparent": True, "legend.frameon": False}
INK = "#010203"  # becomes the page's text colour
MINUS = "\N{MINUS SIGN}"
PLAIN |= {f"{key}color": INK for key in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}
VIEWS = {"last": "last epoch", "best": "best epoch", "vs": "difference to", "published": "difference to published"}
VIEWS |= {"seconds": "seconds per epoch", "macro_f1": "macro-F1"}
MARKED, MARKS = ("vs", "published"), {"within noise": " ≈", "beyond noise": " ≠"}
FILES = ("config.json", "metrics.jsonl")


def html(numbers: dict) -> str:
    """The page; all text that comes from a run's files is escaped."""
    with matplotlib.rc_context(PLAIN):
        body = [accuracy(numbers), over_pairs(numbers), cost(numbers), run_list(numbers["runs"])]
    content = json.dumps(numbers, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": escape(numbers["title"]), "summary": escape(summary(numbers)), "body": "\n".join(body)}
    return TEMPLATE.substitute(parts, json=content)


def summary(numbers: dict) -> str:
    """How many runs there are, and what made them."""
    runs = numbers["runs"]
    states = [f"{n} {s}" for s in ("finished", "failed", "unfinished") if (n := sum(run["state"] == s for run in runs))]
    devices, commits = (", ".join(sorted({run[key] for run in runs})) for key in ("device", "commit"))
    hours = f"{hours:.3g} hours" if (hours := numbers["hours"]) >= 1 else f"{60 * hours:.3g} minutes"
    return f"Runs: {', '.join(states)}; {hours} of training on {devices}; commit {commits}"


def embedded(text: str) -> dict:
    """The numbers in a page."""
    return json.loads(re.search('<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)[1])


def grid(head: list[str], rows: list[list], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    lines = [f"<tr><th>{first}{''.join(f'<td>{cell}' for cell in cells)}" for first, *cells in rows]
    heads = "".join(f"<th>{name}" for name in head)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{heads}<tbody>{"".join(lines)}</table></div>'


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of plain text, the head first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def spread(mean: float, sd: float | None) -> str:
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} <small>± {sd:.2f}</small>"


def highest(numbers: dict, pair: str, key: str) -> float | None:
    return max((row[pair][key][0] for row in numbers["cells"].values() if key in row.get(pair, {})), default=None)


def most_trials(numbers: dict) -> int:
    return max((len(cell["trials"]) for row in numbers["cells"].values() for cell in row.values()), default=0)


def accuracy(numbers: dict) -> str:
    """The table of methods by pairs. Each cell holds all its views, and CSS shows the one that is chosen."""
    pairs, control = numbers["pairs"], escape(str(numbers["control"]))
    cells = [cell for row in numbers["cells"].values() for cell in row.values()]
    most = most_trials(numbers)
    views = [view for view in VIEWS if any(cell.get(view) for cell in cells)]
    found = {view: [d["mean"] for cell in cells if (d := difference(cell, view))] for view in MARKED}
    widest = {view: max(map(abs, values), default=0) or 1 for view, values in found.items()}

    def content(method: str, pair: str) -> str:
        cell = numbers["cells"][method].get(pair)
        if cell is None:
            return '<span class="none" title="no run">·</span>'
        notes = [f"n {len(cell['trials'])}"] if 0 < len(cell["trials"]) < most else []
        notes += [f"{cell[state]} {state}" for state in ("failed", "unfinished") if cell[state]]
        note, spans = f"<em>{', '.join(notes)}</em>" * bool(notes), []
        for view in views:
            kind = view
            if view in MARKED and cell.get(view):
                d = difference(cell, view)["mean"]
                kind += f' {"up" if d > 0 else "down"}" style="--s:{abs(d) / widest[view]:.2f}'
            elif view != "seconds" and cell.get(view):
                kind += " top" * (cell[view][0] == highest(numbers, pair, view))
            spans.append(f'<span class="{kind}">{value(cell, view)}{note}</span>')
        return f'<button data-method="{escape(method)}" data-pair="{escape(pair)}">{"".join(spans)}</button>'

    radios = ""
    for view in views:
        radios += f'<label><input type="radio" name="view" id="{view}"{" checked" * (view == views[0])}> {VIEWS[view]}'
        radios += f"{f' {control}' * (view == 'vs')}</label>"
    rows = [[escape(method), *(content(method, pair) for pair in pairs)] for method in numbers["cells"]]
    head = ["teacher<br>student", *("<br>".join(map(escape, pair.split("->", 1))) for pair in pairs)]
    about = (
        f"Test accuracy in percent; mean ± standard deviation over {most} trials, or n. Bold: the highest mean of a "
        "pair, significant or not. ·: no run. A cell opens its curves, runs, commands and checksums. Differences to "
        f"{control}: over shared seeds, ± half the 95% interval of a paired t test. ≈ and ≠: within and beyond noise, "
        "that is the interval of this one difference. Seconds per epoch: of the call / its number of methods. "
    )
    about += published_note(cells)
    table = grid(head, rows, "accuracy") if rows else "<p>There are no students here.</p>"
    return f'<h2>Accuracy</h2><div class="views">{radios}</div>{table}<p class="soft">{about}</p>'


def value(cell: dict, view: str) -> str:
    """A cell's number in a view."""
    if not cell.get(view):
        return "-"
    if view in MARKED:
        d = difference(cell, view)
        text = f"{'+' if d['mean'] >= 0 else MINUS}{spread(abs(d['mean']), d['half'])}"
        return text + MARKS.get(d["verdict"], "")
    if view == "seconds":
        return f"{cell['seconds']:.3g}" + f" <small>/ {cell['together']}</small>" * (cell["together"] > 1)
    return spread(*cell[view])


def difference(cell: dict, view: str) -> dict | None:
    """To the control, or to the first of the published numbers."""
    return cell.get("vs") if view == "vs" else next(iter(cell["published"]), None)


def published_note(cells: list[dict]) -> str:
    off = escape(", ".join(sorted({key for cell in cells for key in cell["off"]})))
    if any(cell["published"] for cell in cells):
        text = (
            "Published numbers are compared with the epoch that their source reports, or with the last if it does not "
            "say, by Welch's interval; no mark: the published uncertainty is unknown."
        )
        return text + f" Not compared: runs with {off}." * bool(off)
    if off:
        return f"Not compared with published numbers, which have other settings than these runs: {off}."
    return "No published numbers are known for these pairs and methods."


def tests(numbers: dict) -> tuple[list[str], list[list]]:
    """Head and rows of the table of methods against the control over pairs."""
    rows = []
    for method, row in numbers["across"].items():
        better = "{:.2f} <small>{:.2f} to {:.2f}</small>".format(*row["beats"]) if "beats" in row else "-"
        ps = [f"{row[key]:.2g}" for key in ("p", "holm")]
        mean = f"{row['mean']:+.2f}".replace("-", MINUS)
        rows.append([escape(method), row["pairs"], mean, row["higher"], row["lower"], *ps, better])
    head = ["pairs", "mean difference", "higher", "lower", "Wilcoxon p", "Holm p", "P(better)"]
    return [f"against {escape(str(numbers['control']))}", *head], rows


def limits(numbers: dict) -> list[str]:
    """What could have been found at all."""
    found = numbers["across"]
    n = max((row["pairs"] for row in found.values()), default=len(numbers["pairs"]))
    least = 2.0 ** (1 - n)
    holm = min(1.0, least * len(found))
    over = f"With {n} pairs, Wilcoxon's p cannot be below {least:.2g}"
    if found:
        over += f", nor below {holm:.2g} after Holm's correction for {len(found)} methods"
        over += ": <b>nothing here can be significant</b>" * (holm >= 0.05)
    power = [f"{trials} trials find {d:.1f} standard deviations" for trials, d in numbers["detectable"].items()]
    return [
        f"{over}. Seven pairs or fewer can show nothing about four methods or more.",
        *[f"Within a pair, {', '.join(power)} (Welch's test, 80% power)."] * bool(power),
        "P(better): a trial beats the control's of the same seed; bootstrap interval over pairs and trials.",
        "Pairs share data and teachers, so they are not independent: p and intervals are too optimistic.",
    ]


def over_pairs(numbers: dict) -> str:
    """Methods against the control over pairs."""
    text = f"<p>This needs two pairs with runs of {escape(str(numbers['control']))} and of another method.</p>"
    if numbers["across"]:
        text = grid(*tests(numbers))
    if numbers["rank"]:
        text += (
            f"<details><summary>Critical-difference diagram</summary>{rank_figure(**numbers['rank'])}<p class='soft'>"
            "Mean ranks over the pairs, 1 is best; bars join methods that Nemenyi's test does not distinguish. Its "
            "verdict on two methods depends on which others are in the table.</p></details>"
        )
    return f'<h2>Over pairs</h2>{text}<ul class="soft">{"".join(f"<li>{limit}" for limit in limits(numbers))}</ul>'


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def rank_figure(ranks: dict[str, float], cd: float) -> str:
    """Critical-difference diagram: names at their mean ranks, bars over those within the critical difference."""
    names = sorted(ranks, key=ranks.get)
    values, k = [ranks[name] for name in names], len(names)
    bars = [(i, max(j for j in range(k) if values[j] - values[i] <= cd)) for i in range(k)]
    bars = [bar for n, bar in enumerate(bars) if bar[1] > bar[0] and all(bar[1] > other[1] for other in bars[:n])]
    top, height = len(bars) + 1, (k + 1) // 2
    figure = Figure(figsize=(9, 0.7 + 0.16 * len(bars) + 0.24 * height))
    axes = figure.add_subplot(xlim=(1 - 0.45 * k, 1.45 * k), ylim=(-1.6 * height - 0.5, top + 2))
    axes.axis("off")
    ink, small = {"color": INK, "linestyle": "-"}, {"va": "center", "fontsize": 8}
    axes.plot([1, k], [top, top], **ink, linewidth=1)
    for rank in range(1, k + 1, k // 12 + 1):
        axes.text(rank, top + 0.7, str(rank), ha="center", **small)
    axes.plot([1, 1 + min(cd, k - 1)], [top + 1.7] * 2, **ink, linewidth=2)
    axes.text(1.2 + min(cd, k - 1), top + 1.7, f"CD {cd:.2f}", **small)
    for n, (i, j) in enumerate(bars):
        axes.plot([values[i] - 0.06, values[j] + 0.06], [top - 0.7 - n] * 2, **ink, linewidth=3)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y, end, side = (-1.6 * i, 0.8, "right") if i < height else (-1.6 * (k - 1 - i), k + 0.2, "left")
        axes.plot([value, value, end], [top, y, y], **ink, linewidth=0.7)
        axes.text(end, y, f" {name[:40]} {value:.2f} ", ha=side, **small)
    return svg(figure)


def cost(numbers: dict) -> str:
    """Accuracy against time, and the networks."""
    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot(xlabel="seconds per epoch / methods in the call", ylabel="test accuracy (%)")
    for i, pair in enumerate(numbers["pairs"]):
        cells = [row[pair] for row in numbers["cells"].values() if row.get(pair, {}).get("trials")]
        colours = [INK, *COLOURS.by_key()["color"][1:]]  # of black, Matplotlib says nothing in an SVG
        style = {"color": colours[i % 8], "marker": "os^Dv"[i // 8 % 5], "alpha": 0.8, "s": 22}
        x, y = [cell["seconds"] / cell["together"] for cell in cells], [cell["last"][0] for cell in cells]
        axes.scatter(x, y, label=pair.replace("->", " → ")[:60], **style)
    axes.grid(alpha=0.25)
    axes.set_xlim(left=0)  # methods of one call share the clock: their times differ by nothing that matters
    if numbers["pairs"]:
        figure.legend(loc="outside right upper", fontsize=8)
    picture = svg(figure) if numbers["pairs"] else ""
    return f'<h2>Cost</h2><div class="figures">{picture}{grid(*networks(numbers))}</div>'


def networks(numbers: dict) -> tuple[list[str], list[list]]:
    """Head and rows of the table of networks."""
    rows = []
    for name, net in numbers["networks"].items():
        macs = f"{net['macs'] / 1e6:,.1f}" if "macs" in net else "-"
        ms = f"{net['latency_ms']:.2f}" if "latency_ms" in net else "-"
        rows.append([escape(name), f"{net['params']:,}", macs, ms, spread(*net["taught"]) if net["taught"] else "-"])
    return ["network", "parameters", "million MACs", "CPU ms, 1 image, 1 thread", "accuracy as teacher"], rows


def run_list(runs: list[dict]) -> str:
    """All runs in the order of numbers["runs"], from which the cells' rows are taken."""
    head = ["network", "method", "trial", "seed", "state", "last", "best (epoch)", "s/epoch", "MiB", "files", "commit"]
    head += ["last checkpoint", "more"]
    rows = []
    for run in runs:
        about = [run["arch"], run["method"], run["trial"], run["seed"], f"{run['state']} {run['reason']}"]
        if run["epochs"]:
            about += [f"{run['last']:.2f}", f"{run['best']:.2f} ({run['best_epoch']:.0f})"]
            about += [f"{run['seconds'] / run['epochs']:.3g}", run["peak_mib"] or "-"]
        else:
            about += ["-"] * 4
        files = " ".join(f'<a href="./{quote(run["folder"])}/{name}">{name}</a>' for name in FILES)
        sha256 = f'<code title="SHA-256 {run["sha256"]}">{(run["sha256"] or "none")[:12]}</code>'
        worst = "lowest recall: " + ", ".join(f"{name[:40]} {value:.2f}" for value, name in run["worst"])
        more = "; ".join([run["device"], *[worst] * bool(run["worst"]), run["command"]])
        more = f"<details><summary>command</summary><code>{escape(more)}</code></details>"
        rows.append([*(escape(str(value)) for value in about), files, escape(run["commit"]), sha256, more])
    return f"<h2>Runs</h2><details><summary>All {len(rows)} runs</summary>{grid(head, rows, 'runs')}</details>"


def markdown(numbers: dict) -> str:
    """The page's tables: accuracy in the last epoch, differences to the control, tests over pairs, networks."""
    pairs, most = numbers["pairs"], most_trials(numbers)

    def plain(content: object) -> str:  # of HTML
        text = unescape(re.sub("<[^>]*>", "", str(content)))
        return text.replace("<", "&lt;").replace("|", "\\|")

    def table(head: list[str], rows: list[list]) -> str:
        return markdown_table([[plain(content) for content in row] for row in (head, *rows)])

    def cell(method: str, pair: str, view: str) -> str:
        cell = numbers["cells"][method].get(pair, {"trials": ()})
        n, text = len(cell["trials"]), value(cell, view)
        if view == "last" and n:
            text = f"**{text}**" if cell[view][0] == highest(numbers, pair, view) else text
            text += f" (n {n})" * (n < most)
        return text

    def accuracies(view: str) -> str:
        head = ["teacher -> student", *(pair.replace("->", " -> ") for pair in pairs)]
        rows = [[escape(method), *(cell(method, pair, view) for pair in pairs)] for method in numbers["cells"]]
        return table([escape(text) for text in head], rows)

    parts = [
        f"{plain(escape(summary(numbers)))}.",
        f"Test accuracy after the last epoch in percent: mean ± standard deviation over {most} trials, or n. Bold: the "
        "highest mean of a pair, significant or not.",
        accuracies("last"),
        f"Difference to {plain(escape(str(numbers['control'])))} over shared seeds, ± half the 95% interval of a "
        "paired t test. ≈ and ≠: within and beyond noise, that is the interval of this one difference.",
        accuracies("vs"),
        f"Methods over pairs:\n\n{table(*tests(numbers))}" if numbers["across"] else "",
        "\n".join(f"- {re.sub('</?b>', '**', limit)}" for limit in limits(numbers)),
        table(*networks(numbers)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def csv_text(numbers: dict) -> str:
    """One row per run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(numbers["runs"])
    return buffer.getvalue()


def latex(numbers: dict) -> str:
    """Methods by pairs, for the package booktabs; the last epoch, the highest mean of a pair in bold."""
    special = {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special["^"] = r"\textasciicircum{}"

    def tex(text: str) -> str:
        return "".join(special.get(c, c) for c in text)

    def cell(method: str, pair: str) -> str:
        if "last" not in numbers["cells"][method].get(pair, {}):
            return "--"
        mean, sd = numbers["cells"][method][pair]["last"]
        text = f"{mean:.2f}" if mean != highest(numbers, pair, "last") else f"\\textbf{{{mean:.2f}}}"
        return text if sd is None else f"{text} {{\\scriptsize $\\pm$ {sd:.2f}}}"

    methods, pairs = numbers["cells"], numbers["pairs"]
    head = [[name, *(tex(pair.split("->", 1)[i]) for pair in pairs)] for i, name in enumerate(("Teacher", "Student"))]
    rows = [[tex(method), *(cell(method, pair) for pair in pairs)] for method in methods]
    head, rows = ("".join(f"{' & '.join(row)} \\\\\n" for row in part) for part in (head, rows))
    begin = f"% \\usepackage{{booktabs}}\n\\begin{{tabular}}{{l{'c' * len(pairs)}}}\n\\toprule\n"
    return f"{begin}{head}\\midrule\n{rows}\\bottomrule\n\\end{{tabular}}\n"
