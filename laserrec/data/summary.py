"""What `prepare` kept, left out and why, in sentences: the same in the CLI, in Python and in the report."""

from __future__ import annotations

import warnings
from typing import Any

from laserrec.data.losses import LOUD, LossWarning

NO_VALIDATION = ("No user has three interactions, so there is nothing to validate or test on: leave-one-out holds out "
                 "two and needs one before them. Give longer histories, or train without validation.")
_NAMES = ("users", "items", "interactions")
_NAMED = 10
"""So many unused columns are named."""


def summary_lines(report: dict[str, Any]) -> list[str]:
    """One sentence per fact of `prepare`'s report."""
    read, kept = report["steps"][0], report["steps"][-1]
    lines = [f"Kept {', '.join(f'{kept[name]:,} of {_count(read[name], name)}' for name in _NAMES)}."]
    if count := report.get("skipped_lines"):
        lines.append(f"Left out {_count(count, 'broken lines')}.")
    if (unused := report.get("unused_columns")) is not None:
        lines.append(_rows_order(unused, report.get("unused_dates", [])))
    if units := report.get("time_units"):
        told = " and ".join(f"{count:,} look like {unit}" for unit, count in units.items())
        lines.append(f"Of the timestamps {told} since 1970, so their order is wrong; write all in one unit.")
    for step in report["steps"][1:]:
        if dropped := [_count(step["dropped"][name], name) for name in _NAMES if step["dropped"][name]]:
            lines.append(f"Dropped {', '.join(dropped)}: {step['step']}.")
    if why := report["unmatched"].get("why"):
        lines.append(f"{report['unmatched']['items']:,} of {_count(read['items'], 'item ids')} of the interactions are "
                     f"not among the items: {why}")
    if report["share_of_items_without"]["title"] == 1:
        lines.append("No item has a title.")
    elif count := report["untitled_items"]:
        lines.append(f"Without a title: {_count(count, 'items')} of the metadata.")
    if count := report.get("duplicate_item_rows"):
        lines.append(f"Left out {_count(count, 'rows')} that repeat an item; each keeps its most frequent title.")
    if count := report.get("items_without_vector"):
        lines.append(f"Without a vector of its own: {_count(count, 'items')} of the metadata.")
    new = report["new_items"]
    if any(new.values()):
        lines.append(f"Kept as new items, without interactions: {new['never_bought']:,} that nobody bought, "
                     f"{new['too_few_interactions']:,} bought too rarely to be learnt.")
    if not report["interactions_per_split"]["validation"]:
        lines.append(NO_VALIDATION)
    return lines


def _rows_order(unused: list[str], dates: list[str]) -> str:
    told = "There is no timestamp: the rows are taken in their order, oldest first."
    if not unused:
        return told
    names = ", ".join(unused[:_NAMED]) + (", ..." if len(unused) > _NAMED else "")
    return (f"{told} Unused columns of the interactions: {names}. If one holds the time, map it: --columns "
            f"timestamp={dates[0] if dates else 'YOUR_COLUMN'}.")


def warn_of_losses(report: dict[str, Any]) -> None:
    """LossWarning with the whole summary, where more than a tenth of something was lost, or of the items has no vector
    although some have, or nothing can be validated, or the order in time is in doubt (an unused column of dates,
    timestamps of several units)."""
    read, kept = report["steps"][0], report["steps"][-1]
    shares = [1 - kept[name] / read[name] for name in ("interactions", "users", "items")]
    skipped = report.get("skipped_lines", 0)
    shares.append(skipped / (skipped + read["interactions"]))
    shares.append(report.get("items_without_vector", 0) / max(1, read["items_in_metadata"]))
    doubt = report.get("unused_dates") or report.get("time_units")
    if max(shares) > LOUD or doubt or not report["interactions_per_split"]["validation"]:
        warnings.warn(" ".join(summary_lines(report)), LossWarning, stacklevel=4)


def _count(count: int, what: str) -> str:
    """"1 user" or "2 users"."""
    return f"{count:,} {what if count != 1 else what.removesuffix('s')}"
