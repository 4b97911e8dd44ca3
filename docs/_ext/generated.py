"""Parts of pages that are generated from the code and from benchmarks/results: commands, settings, modules, tables.

A page marks the place of each: `<!-- generated: NAME ARGUMENT -->`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docstrings import escape
from pydantic import BaseModel
from sphinx.application import Sphinx

from laserrec.cli.main import app as command_line
from laserrec.config import Config
from laserrec.config.described import SECTIONS, flags, in_words, kind
from laserrec.experiments.datasets import means
from laserrec.presets import PRESETS

_DOCS = Path(__file__).parents[1]
_PACKAGE = _DOCS.parent / "laserrec"
_RESULTS = _DOCS.parent / "benchmarks" / "results"

# -- the command line ---------------------------------------------------------------------------------------------


def commands() -> str:
    """Markdown of all commands, as cyclopts writes it."""
    text = command_line.generate_docs(output_format="markdown")
    text = re.sub(r"^(laserrec\b[^\[\n]*?) -m \S+", r"\1", text, flags=re.MULTILINE)  # `python -m sphinx` gets in
    return _with_examples(text[text.index("**Commands**") :])


def _with_examples(text: str) -> str:
    """Turn 'Example: COMMAND' and 'Examples:' with indented lines into console blocks."""

    def block(match: re.Match) -> str:
        lines = [line.strip() for line in match[1].splitlines() if line.strip()]
        return "```console\n" + "".join(f"$ {line}\n" for line in lines) + "```\n"

    return re.sub(r"^Examples?:(.*\n(?: +.*\n)*)", block, text, flags=re.MULTILINE)


# -- the settings ---------------------------------------------------------------------------------------------------


def settings() -> str:
    """Markdown of all settings: per section a table of the presets' values and a description of each setting."""
    return "\n".join(_section(name, section) for name, section in SECTIONS.items())


def _section(name: str, section: type[BaseModel]) -> str:
    columns = _preset_columns()
    head = ["setting", "default", *(", ".join(names) for names in columns)]
    rows = [head, ["---"] * len(head)]
    meanings = []
    for field, info in section.model_fields.items():
        full = f"{name}.{field}"
        own = [PRESETS[names[0]].get(name, {}).get(field, info.default) for names in columns]
        cells = [_value(info.default), *(_value(v) if v == info.default else f"**{_value(v)}**" for v in own)]
        rows.append([f"[`{full}`](#{_anchor(full)})", *cells])
        ways = " or ".join(f"`{one}`" for one in flags(name, field, info))
        meanings.append(f"[`{full}`]{{#{_anchor(full)}}}\n: {_text(info.description)}\n\n"
                        f"  {kind(info, '`')}; {ways}\n")
    return f"(section-{name})=\n## {name}\n\n{_text(section.__doc__)}\n\n{_table(rows)}\n" + "\n".join(meanings)


def _preset_columns() -> list[list[str]]:
    """Columns of the table: presets with equal values share one."""
    columns: list[list[str]] = []
    for name, tree in PRESETS.items():
        same = next((names for names in columns if PRESETS[names[0]] == tree), None)
        columns.append([name]) if same is None else same.append(name)
    return columns


def _anchor(full: str) -> str:
    return "setting-" + full.replace(".", "-").replace("_", "-")


def _text(text: str | None) -> str:
    """Join to one line and escape Markdown, except `code`."""
    if not text:
        raise ValueError("a setting or section has no description")
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_<>\[\]{}$|])", r"\\\1", p) for p in parts)


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_value, value))
    return f"`{in_words(value)}`"


def sections() -> str:
    """The config classes for the Python reference. Their fields are described by `settings`."""
    lines = ["```{eval-rst}", ".. py:class:: laserrec.config.Config", "", f"   {Config.__doc__} Frozen.", ""]
    for name, section in SECTIONS.items():
        lines += [f"   .. py:attribute:: {name}", f"      :type: {section.__name__}", ""]
    for name, section in SECTIONS.items():
        lines += [f".. py:class:: laserrec.config.{section.__name__}", "",
                  f"   {escape(' '.join(section.__doc__.split()))} Fields: :ref:`section-{name}`.", ""]
    return "\n".join([*lines, "```"])


# -- the Python reference -------------------------------------------------------------------------------------------


def api(room: str) -> str:
    """Every public class and function of a room, module by module, for autodoc."""
    folder = _PACKAGE.joinpath(*room.split("."))
    return "\n".join(_members(file) for file in sorted(folder.rglob("[!_]*.py")))


def _members(file: Path) -> str:
    module = ".".join(file.relative_to(_PACKAGE.parent).with_suffix("").parts)
    lines = [f"## {module.removeprefix('laserrec.')}", "", "```{eval-rst}", f".. automodule:: {module}", ""]
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            kind, options = ("class", "   :members:") if isinstance(node, ast.ClassDef) else ("function", "")
            lines += [f".. auto{kind}:: {module}.{node.name}", options, ""]
    return "\n".join([*lines, "```", ""])


# -- the pages in order ---------------------------------------------------------------------------------------------

_GUIDES = ("concepts", "data", "troubleshooting", "python", "watching", "serving", "security", "sharing", "scaling",
           "results", "reproducing", "method", "code")


def guides() -> str:
    """A table of contents: the pages of _GUIDES in that order, then all others."""
    there = {file.stem for file in _DOCS.glob("*.md")} - {"index"}
    pages = [page for page in _GUIDES if page in there] + sorted(there - {*_GUIDES})
    return "\n".join(["```{toctree}", ":caption: Guide", ":maxdepth: 1", "", *pages, "```"])


# -- the code -------------------------------------------------------------------------------------------------------


_ROOMS = ("cli", "experiments", "server", "batch", "report", "recommender", "retrieval", "training", "methods",
          "methods.laser", "evaluation", "llm", "data", "util")


def modules() -> str:
    """A section per room, from the highest to the lowest: its docstring and a table of its modules."""
    there = {".".join(file.parent.relative_to(_PACKAGE).parts) for file in _PACKAGE.glob("*/**/__init__.py")}
    rooms = [room for room in _ROOMS if room in there] + sorted(there - {*_ROOMS})
    return "\n".join([*map(_room, rooms), "## laserrec itself\n\n" + _module_table(_PACKAGE)])


def _room(name: str) -> str:
    folder = _PACKAGE.joinpath(*name.split("."))
    return f"## {name}\n\n{_summary(folder / '__init__.py')}\n\n{_module_table(folder)}"


def _module_table(folder: Path) -> str:
    files = sorted(folder.glob("[!_]*.py"))
    return _table([["module", "what"], ["---", "---"], *([f"`{file.stem}`", _summary(file)] for file in files)])


def _summary(file: Path) -> str:
    """First paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return _text(docstring.split("\n\n")[0]) if docstring else ""


# -- measured figures ---------------------------------------------------------------------------------------------


def _results(name: str) -> Any:
    return json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _figure(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}".replace("0.", ".", 1)


def quality() -> str:
    """benchmarks/results/quality.json as a table: means over seeds, ± the standard deviation of several, and how many
    settings were tried (benchmarks/results/trials.json)."""
    result, tried = _results("quality"), _results("trials")
    k = result["config"]["eval"]["k"]
    rows = [["model", f"Recall@{k}", f"NDCG@{k}", "MRR", "seeds", "tried", "gain", "95%"]]
    rows.append(["---"] * len(rows[0]))
    for row in sorted(result["summary"], key=lambda r: -r[f"ndcg@{k}"]):
        cells = [_figure(row[m]) for m in (f"recall@{k}", f"ndcg@{k}", "mrr")]
        if row["seeds"] > 1:
            spreads = (_figure(row[f"{m}_sd"]) for m in (f"recall@{k}", f"ndcg@{k}", "mrr"))
            cells = [f"{mean}\xa0±\xa0{spread}" for mean, spread in zip(cells, spreads, strict=True)]
        gain, low, high = (_figure(row[name], "+") for name in (f"ndcg@{k}_difference", "low", "high"))
        against = ["", ""] if row["model"] == row["against"] else [gain, f"{low}\xa0to\xa0{high}"]
        rows.append([row["model"], *cells, str(row["seeds"]), str(tried[row["model"]]), *against])
    return _table(rows)


def cold_start() -> str:
    """benchmarks/results/cold_start.json, whole histories: means over seeds."""
    result = _results("cold_start")
    k = result["config"]["eval"]["k"]
    whole = [row for row in result["rows"] if row["history"] == "all"]
    rows = [["target", "model", f"Recall@{k}", f"NDCG@{k}", "MRR", "cases", "seeds"]]
    rows.append(["---"] * len(rows[0]))
    for target in ("new", "known"):
        for model in dict.fromkeys(row["model"] for row in whole):
            own = [row for row in whole if (row["target"], row["model"]) == (target, model)]
            means = [_figure(sum(row[m] for row in own) / len(own)) for m in (f"recall@{k}", f"ndcg@{k}", "mrr")]
            rows.append([target, model, *means, f"{sum(row['users'] for row in own):,}", str(len(own))])
    return _table(rows)


def datasets() -> str:
    """benchmarks/results/datasets.json: Recall@10 / NDCG@10 of each model on each data set, means over seeds."""
    rows = means(_results("datasets"), 10)
    found = {(row["model"], row["data"]): row for row in rows}
    names = list(dict.fromkeys(row["data"] for row in rows))
    best = {name: max(row["ndcg@10"] for row in rows if row["data"] == name) for name in names}
    models = list(dict.fromkeys(row["model"] for row in rows))
    models.sort(key=lambda model: (model != "Laser", -sum((model, name) in found for name in names)))

    def cell(model: str, name: str) -> str:
        row = found.get((model, name))
        if row is None:
            return ""
        ndcg = _figure(row["ndcg@10"])
        return f"{_figure(row['recall@10'])} / {f'**{ndcg}**' if row['ndcg@10'] == best[name] else ndcg}"

    return _table([["", *names], ["---"] * (len(names) + 1),
                   *([model, *(cell(model, name) for name in names)] for model in models)])


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


# -- into the pages -----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[..., str]] = {"api": api, "commands": commands, "settings": settings,
                                       "sections": sections, "guides": guides, "modules": modules,
                                       "quality": quality, "cold-start": cold_start, "datasets": datasets}
"""The function that generates each NAME."""
_MARK = re.compile(r"^<!-- generated: (\S+)(.*) -->$", re.MULTILINE)


def _fill(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = _MARK.sub(lambda mark: PARTS[mark[1]](*mark[2].split()), content[0])


def _generated(app: Sphinx, env: Any, added: set, changed: set, removed: set) -> list[str]:
    """Pages with generated parts are rebuilt every time, since changes of the code do not show in their source."""
    return [page for page in env.found_docs if _MARK.search(Path(env.doc2path(page)).read_text(encoding="utf-8"))]


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", _fill)
    app.connect("env-get-outdated", _generated)
    return {"parallel_read_safe": True}
