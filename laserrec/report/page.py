"""The report's page: one file, no script, nothing fetched; light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from laserrec import __version__
from laserrec.report.charts import bar_chart, key, number, scatter
from laserrec.report.collect import Curves, Example, Report, Suggestion
from laserrec.report.curves import epoch_loss_chart, metric_names, step_charts, validation_chart
from laserrec.report.experts import Expert, Trait
from laserrec.report.item_map import ItemMap
from laserrec.report.markup import Markup, join, tag
from laserrec.report.results import Results, Row

# Nothing may be fetched, whatever a title holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_METHODS = {"tsne": "t-SNE", "pca": "PCA"}
_MEANING = {"tsne": "near each other means alike to the model; directions and distances across the map mean nothing",
            "pca": "the two directions of most variance, which hide all others (for a map that keeps neighbours "
            "together: pip install 'laserrec[report]')"}


def render(report: Report) -> str:
    """The whole page; the same report gives the same text."""
    sections = [("summary", "Summary", _summary(report)), ("results", "Results", _results(report.results)),
                ("training", "Training", _training(report)), ("experts", "Experts", _experts(report)),
                ("map", "Map of the items", _map(report.items)), ("examples", "Recommendations", _examples(report)),
                ("settings", "Settings and data", _settings(report))]
    style = files("laserrec.report").joinpath("style.css").read_text(encoding="utf-8")
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
               tag("title", f"{report.name}: laserrec report"), tag("link", rel="icon", href="data:,"),
               tag("style", Markup(style)))
    links = tag("nav", [tag("a", title, href=f"#{name}") for name, title, _ in sections], aria_label="Sections")
    body = [tag("section", tag("h2", title, id=f"{name}-title"), content, id=name, aria_labelledby=f"{name}-title")
            for name, title, content in sections]
    header = tag("header", tag("h1", report.name), tag("p", "A run of laserrec, reported by version ", __version__))
    page = tag("html", head, tag("body", header, links, tag("main", body)), lang="en")
    return join(Markup("<!doctype html>\n"), page, Markup("\n"))


# -- summary and results ----------------------------------------------------------------------------------------------


def _summary(report: Report) -> Markup:
    training, table = report.model["training"], report.data["table1"]
    best = training["best"]
    ndcg = next(k for k in best if k.startswith("validation_ndcg@"))
    cards = [(f"{best[ndcg]:.4f}", f"NDCG@{ndcg.partition('@')[2]} on validation"),
             (f"stage {best['stage']}, epoch {best['epoch']}", "kept, the best on validation"),
             (f"{training['trained_parameters']:,}", "trained parameters"),
             (_duration(training["seconds"]), "to fit"),
             (f"{table['users']:,}", "users"), (f"{table['items']:,}", "items")]
    return tag("dl", [tag("div", tag("dt", label), tag("dd", value)) for value, label in cards], class_="cards")


def _results(results: Results | None) -> Markup:
    if results is None:
        return _note("No results file was found. laserrec evaluate DATA RUN popularity --json results.json makes one; "
                     "name it with --results.")
    hidden = all(row.hidden for row in results.rows)
    facts = [f for f in ("users", "seeds", "seconds") if all(f in row.facts for row in results.rows)]
    best = {m: max(row.metrics[m] for row in results.rows) for m in results.metrics}
    names = [_metric(m) for m in results.metrics]
    heads = [*names, *(f"{n}, new" for n in names if hidden), *facts]
    rows = [tag("tr", tag("th", row.model, scope="row"), [_value(row, m, best) for m in results.metrics],
                [tag("td", f"{row.hidden[m]:.4f}") for m in results.metrics if hidden],
                [tag("td", f"{row.facts[f]:,.0f}") for f in facts]) for row in results.rows]
    text = (f"{results.split.capitalize()} split, all items ranked, nothing filtered; the best of each column is bold. "
            + ("“New”: the history's items are not ranked, and a target among them counts as lost. " if hidden else "")
            + ("± is the standard deviation over seeds. " if any(r.deviation for r in results.rows) else "")
            + f"From {results.file}.")
    ndcg = next(m for m in results.metrics if m.startswith("ndcg"))
    chart = bar_chart(f"{_metric(ndcg)}, {results.split} split", [r.model for r in results.rows],
                      [r.metrics[ndcg] for r in results.rows], [f"{r.metrics[ndcg]:.4f}" for r in results.rows],
                      _metric(ndcg))
    table = _table("Results", ["model", *heads], rows)
    return join(_note(text), table, tag("div", chart, class_="split below"))


def _value(row: Row, metric: str, best: dict[str, float]) -> Markup:
    text = f"{row.metrics[metric]:.4f}" + (f" ± {row.deviation[metric]:.4f}" if metric in row.deviation else "")
    return tag("td", tag("strong", text) if row.metrics[metric] == best[metric] else text)


# -- training ---------------------------------------------------------------------------------------------------------


def _training(report: Report) -> Markup:
    parts = [tag("h3", "Laser"), *_one_training(report.fit), _epoch_table(report.fit)]
    if report.pretraining is not None:
        parts += [tag("h3", "ID model"), *_one_training(report.pretraining)]
    else:
        parts.append(_note("The ID model's own training is not shown: its folder is not beside the model."))
    return join(parts)


def _one_training(curves: Curves) -> list[Markup]:
    charts = [validation_chart(curves), epoch_loss_chart(curves), *step_charts(curves)]
    note = None if curves.steps else _note("Only epochs were logged (there is no training.jsonl): the folder was made "
                                           "by an earlier version.")
    return [join(note), tag("div", charts, class_="charts")]


def _epoch_table(curves: Curves) -> Markup | None:
    if not curves.epochs:
        return None
    names, rows = metric_names(curves.epochs[0]), []
    for entry in curves.epochs:
        kept = all(entry.get(k) == v for k, v in curves.kept.items())
        place = "untrained" if entry["epoch"] == 0 else f"{entry['stage']}.{entry['epoch']}"
        rows.append(tag("tr", tag("th", place + (" (kept)" if kept else ""), scope="row"),
                        tag("td", "" if entry["loss"] is None else f"{entry['loss']:.4f}"),
                        [tag("td", f"{entry[n]:.4f}") for n in names], tag("td", f"{entry['seconds']:,.0f}")))
    heads = ["stage.epoch", "loss", *(_metric(n.removeprefix("validation_")) for n in names), "seconds so far"]
    return tag("details", tag("summary", "Epochs in numbers"), _table("Epochs", heads, rows))


# -- experts ----------------------------------------------------------------------------------------------------------


def _experts(report: Report) -> Markup:
    experts = report.experts
    if experts is None:
        return _note("This model has no router: one prefix serves all users.")
    count = len(experts.experts)
    chart = bar_chart("Users by expert", [f"expert {e.number}" for e in experts.experts],
                      [e.share for e in experts.experts], [f"{e.share:.1%} ({e.users:,})" for e in experts.experts],
                      "share of the users", even=1 / count)
    text = (f"The router gives each of {experts.users:,} test users to one of {count} query experts, by the ID model's "
            f"states of the history. The load is as even as that of {experts.effective:.2f} equally used experts "
            f"(exponential of the entropy of the shares; {count} at most). The dashed line is an even load.")
    return join(_note(text), tag("div", chart, class_="split"),
                tag("div", [_expert(e, experts.mean_history) for e in experts.experts], class_="cards wide"))


def _expert(expert: Expert, mean_history: float) -> Markup:
    title = tag("h3", f"Expert {expert.number}")
    if not expert.users:
        return tag("article", title, _note("No user is given to it."))
    facts = (f"{expert.users:,} users, {expert.share:.1%}. Mean history {expert.mean_history:.1f} items "
             f"(all: {mean_history:.1f}).")
    users = [tag("li", tag("span", f"{user.user_id} ", tag("span", f"router {user.score:.2f}", class_="soft")),
                 tag("ul", [tag("li", title) for title in user.titles])) for user in expert.examples]
    return tag("article", title, tag("p", facts), _traits("Categories", "category", expert.categories),
               _traits("Brands", "brand", expert.brands),
               tag("h4", "Users the router is surest of, with their last items"), tag("ul", users, class_="users"))


def _traits(kinds: str, kind: str, traits: Sequence[Trait]) -> Markup:
    if not traits:
        return tag("p", f"{kinds}: none above the average.", class_="soft")
    rows = [tag("tr", tag("th", t.name, scope="row"), tag("td", f"{t.lift:.2f}×"), tag("td", f"{t.share:.1%}"),
                tag("td", f"{t.average:.1%}")) for t in traits]
    return _table(f"{kinds} typical of it, share of users with one", [kind, "lift", "its", "all"], rows)


# -- items ------------------------------------------------------------------------------------------------------------


def _map(items: ItemMap) -> Markup:
    shown = len(items.titles)
    of = f"All {shown:,} items" if shown == items.n_items else f"{shown:,} of {items.n_items:,} items, drawn at random"
    text = (f"{of}, placed by {_METHODS[items.method]} of their embeddings: {_MEANING[items.method]}. Colours are the "
            f"most frequent {'categories' if items.kind == 'category' else 'brands'}; point at an item for its title.")
    counts = items.counts()
    everything = tag("label", tag("input", type="radio", name="group", id="all", checked="checked"), " all")
    choices = [tag("label", tag("input", type="radio", name="group", id=f"only{g}"), key(g), f" {name} ",
                   tag("span", f"{count:,}", class_="soft")) for g, (name, count) in
               enumerate(counts.items())]
    legend = tag("fieldset", tag("legend", "Show"), everything, choices, class_="choices")
    said = f"Map of {shown} items by {_METHODS[items.method]}; groups: " + ", ".join(
        f"{name} {count}" for name, count in counts.items())
    title = f"{_METHODS[items.method]} of the item embeddings"
    chart = scatter(title, said, items.x, items.y, items.group, items.titles)
    return join(_note(text), tag("div", legend, chart, class_="mapped"))


def _examples(report: Report) -> Markup:
    offset = ", plus the learnt offset for items of the history" if report.config.head.seen_offset else ""
    pull = ", raised for what the history's neighbours pull" if report.config.neighbours.count else ""
    text = ("Users of the test split, drawn at random, before their last item. Nothing is filtered. The score is a "
            f"cosine{pull}{offset}.")
    return join(_note(text), [_example(e, report.items.n_items) for e in report.examples])


def _example(example: Example, n_items: int) -> Markup:
    expert = None if example.expert is None else tag("span", f" · expert {example.expert}", class_="soft")
    earlier = tag("li", f"… {example.earlier} before", class_="soft") if example.earlier else None
    rows = [_suggestion(s) for s in example.top]
    if not any(s.is_next for s in example.top):
        rows.append(_suggestion(example.next))
    place = f"The true next item came {_rank(example.next.rank)} of {n_items:,}."
    return tag("article", tag("h3", f"User {example.user_id}", expert),
               tag("div", tag("div", tag("h4", "History, oldest first"),
                              tag("ol", earlier, [tag("li", t) for t in example.history], class_="history")),
                   tag("div", _table("Recommended", ["rank", "item", "score"], rows), tag("p", place)), class_="split"))


def _suggestion(s: Suggestion) -> Markup:
    words = [w for w, yes in (("true next item", s.is_next), ("in the history", s.seen)) if yes]
    badges = [tag("span", w, class_="badge") for w in words]
    return tag("tr", tag("td", number(s.rank)), tag("th", s.title, [join(" ", b) for b in badges], scope="row"),
               tag("td", f"{s.score:.3f}"), class_="true" if s.is_next else None)


def _rank(rank: float) -> str:
    return "first" if rank == 1 else f"at rank {number(rank)}"


# -- settings ---------------------------------------------------------------------------------------------------------


def _settings(report: Report) -> Markup:
    backbone, training, data = report.model["backbone"], report.model["training"], report.data
    facts = {"backbone": backbone["name"], "revision": backbone["revision"],
             "sha256 of its weights": backbone["sha256"], "trained parameters": training["trained_parameters"],
             "of these in prefix and suffix tokens": training.get("bi_tuning_parameters"),
             "seconds to fit": training["seconds"],
             **({"ID model's epochs": len(report.pretraining.epochs)} if report.pretraining else {})}
    split = data.get("split", {})
    numbers = {**data["table1"], **{f"{k} interactions": v for k, v in data.get("interactions_per_split", {}).items()},
               "split": split.get("kind"), **{k: v for k, v in split.items() if k != "kind"},
               "users whose last item is a repeat": data.get("users_whose_last_item_is_a_repeat"),
               "sha256": data["sha256"]}
    tree = report.config.model_dump(mode="json")
    sections = [tag("div", tag("h4", name), _pairs(values)) for name, values in tree.items()]
    both = [tag("div", tag("h3", title), _pairs(values)) for title, values in (("Model", facts), ("Data", numbers))]
    return join(tag("div", both, class_="split"), tag("details", tag("summary", "All settings"),
                                                      tag("div", sections, class_="charts")))


def _pairs(values: dict[str, Any]) -> Markup:
    rows = [tag("tr", tag("th", name.replace("_", " "), scope="row"), tag("td", _plain(value), class_="text"))
            for name, value in values.items() if value is not None]
    return tag("table", tag("tbody", rows), class_="pairs")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# -- small things -----------------------------------------------------------------------------------------------------


def _table(caption: str, heads: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """Wider than a phone, it scrolls by itself, also by keyboard."""
    head = tag("thead", tag("tr", [tag("th", h, scope="col") for h in heads]))
    return tag("div", tag("table", tag("caption", caption), head, tag("tbody", rows)), class_="scroll", tabindex=0,
               role="region", aria_label=caption)


def _note(text: str) -> Markup:
    return tag("p", text, class_="note")


def _metric(name: str) -> str:
    return name.replace("ndcg", "NDCG").replace("recall", "Recall").replace("mrr", "MRR")


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 2e4 else f"{seconds / 3600:,.1f} h"
