"""Results as they are printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.table

from ..scores import Interval, percent


def tables(lines: Sequence[Mapping[str, Any]]) -> Iterator[rich.table.Table]:
    """Makes the printed tables of an evaluation.

    Args:
        lines: The lines of results.jsonl.

    Yields:
        A table for each task, metric and filter, with a row for each protocol. Values are in %, with 95 % intervals.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        filtered = "" if line["filter"] == "none" else f", {line['filter']}"
        groups.setdefault(f"{line['task']}, {line['metric']}{filtered} (n = {line['n']})", []).append(line)
    for title, rows in groups.items():
        shown = rich.table.Table(title=title, title_justify="left")
        for name in ("protocol", "value", "unparsed", "MFLOPs a question", "tokens read + written", "seconds"):
            shown.add_column(name, justify="left" if name == "protocol" else "right")
        for line in rows:
            value, low, high = line["value"], line["low"], line["high"]
            if low is not None and high is not None:
                shown_value = percent(Interval(value, low, high))
            else:
                shown_value = "none scored" if value is None else f"{value:.4g}"
            tokens = f"{line['tokens_read']:.0f} + {line['tokens_written'] + line['message_tokens']:.0f}"
            cost = (f"{line['flops'] / 1e6:.0f}", tokens, f"{line['seconds']:.1f}")
            shown.add_row(line["protocol"], shown_value, str(line["unparsed"] or ""), *cost)
        yield shown
