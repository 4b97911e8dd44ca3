"""A reproduced table as Markdown and as a plot: ours and the paper's figures in columns of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laserrec.experiments.table import over_seeds
from laserrec.util.io import write_text

Rows = Sequence[Mapping[str, Any]]


def groups(rows: Rows, k: int) -> list[dict[str, Any]]:
    """Per data set, base and model: mean and standard deviation over seeds of recall@k, ndcg@k and mrr, the number of
    seeds, the mean seconds of training, and the published figures."""
    published = {row["model"]: row.get("published", {}) for row in rows}
    lines = over_seeds(rows, ("data", "base", "model"), (f"recall@{k}", f"ndcg@{k}", "mrr", "train_seconds"))
    return [{**line, "published": published[line["model"]]} for line in lines]


def cells(line: Mapping[str, Any], k: int) -> list[str]:
    """Of one group: metrics (± sd where there are several seeds), the paper's NDCG@10, seeds, seconds."""
    shown = [f"{line[metric]:.4f}" + (f" ± {line[f'{metric}_sd']:.4f}" if line["seeds"] > 1 else "")
             for metric in (f"recall@{k}", f"ndcg@{k}", "mrr")]
    paper = "; ".join(f"{data} {figures[1]:.4f}" for data, figures in line["published"].items())
    return [*shown, paper, str(line["seeds"]), f"{line['train_seconds']:,.0f}"]


def heads(k: int) -> list[str]:
    """Above `cells`."""
    return [f"Recall@{k}", f"NDCG@{k}", "MRR", "the paper's NDCG@10, other data", "seeds", "seconds"]


def markdown(result: Mapping[str, Any], k: int = 10) -> str:
    """One table per data set and base."""
    lines = [f"# {result['title']}", "", f"Split: {result['split']}; all items ranked, nothing filtered."]
    found = groups(result["rows"], k)
    for data, base in dict.fromkeys((line["data"], line["base"]) for line in found):
        lines += ["", f"## {data}, preset {base}", "", f"| model | {' | '.join(heads(k))} |",
                  "|---" * (1 + len(heads(k))) + "|"]
        lines += [f"| {line['model']} | {' | '.join(cells(line, k))} |" for line in found
                  if (line["data"], line["base"]) == (data, base)]
    if result["missing"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {row['data']}, {row['base']}: {row['model']} ({row['why']})" for row in result["missing"]]
    return "\n".join(lines) + "\n"


def plot(result: Mapping[str, Any], file: Path, k: int = 10) -> None:
    """Bars of NDCG@k, one panel for each data set and base, and one for the paper's own figures. SVG or PNG by the
    name. Raises ImportError without the extra `report`."""
    from matplotlib.figure import Figure

    found = groups(result["rows"], k)
    panels: dict[str, list[tuple[str, float, float]]] = {}
    for line in found:
        panels.setdefault(f"{line['data']}, {line['base']}", []).append(
            (line["model"], line[f"ndcg@{k}"], line[f"ndcg@{k}_sd"]))
    for line in {line["model"]: line for line in found}.values():
        for data, figures in line["published"].items():
            panels.setdefault(f"the paper's, {data}", []).append((line["model"], figures[1], 0.0))
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 1.4 + 0.4 * max(map(len, panels.values()), default=1)),
                    layout="constrained")
    for number, (title, bars) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(1, len(panels), number)
        names, values, spreads = zip(*reversed(bars), strict=True)
        colour = "#8a8f98" if title.startswith("the paper's") else "#d1495b"
        drawn = axis.barh(names, values, xerr=spreads if any(spreads) else None, color=colour)
        axis.bar_label(drawn, [f"{value:.4f}" for value in values], padding=4, fontsize=8)
        axis.set_title(f"{title}: NDCG@{k}", fontsize=9)
        axis.margins(x=0.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def write(result: Mapping[str, Any], out: Path, k: int = 10, text: Callable[[Any, int], str] = markdown,
          draw: Callable[[Any, Path, int], None] = plot) -> list[Path]:
    """OUT/NAME.md, and OUT/NAME.png where matplotlib is there and something was measured."""
    files = [out / f"{result['experiment']}.md"]
    write_text(files[0], text(result, k))
    if result["rows"]:
        try:
            draw(result, out / f"{result['experiment']}.png", k)
            files.append(out / f"{result['experiment']}.png")
        except ImportError:
            pass
    return files
