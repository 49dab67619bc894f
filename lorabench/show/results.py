"""The runs of a sweep and how far they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lorabench.compare.tables import order, short_keys
from lorabench.show.text import console, dump, setting, whole

if TYPE_CHECKING:
    from lorabench.intact import Checked

COLOURS = {
    "finished": "green",
    "failed": "red",
    "interrupted": "yellow",
    "stopped": "yellow",
    "trained": "yellow",
    "planned": "dim",
}


def runs(found: Sequence[Checked], as_json: bool, statuses: Collection[str] = ()) -> None:
    """Show the status of every run, setting by setting, in the order of their seeds.

    Args:
        statuses: to show; none: all. What varies is told among all runs, whatever is shown.
    """
    from lorabench import compare

    table = compare.table([one.entry for one in found])
    ordered = in_order(found, table)
    shown = [one for one in ordered if not statuses or one[0].entry.status in statuses]
    if as_json:
        dump(
            [
                {
                    "run_id": r.run_id,
                    "folder": str(path),
                    "status": r.status,
                    "damaged": damaged,
                    "error": r.error,
                    "stopped_early": r.stopped_early,
                    "steps_done": r.steps_done,
                    "seeds": r.seeds,
                    "setting": one["setting"],
                }
                for (path, r, damaged), one in shown
            ]
        )
        return
    if not shown:
        there = Counter(one.entry.status for one in found)
        told = ", ".join(f"{count} {status}" for status, count in there.items())
        wanted = " or ".join(statuses)
        console().print(f"{found[0].folder.parent}: no run is {wanted}; there are {told}")
        return
    title = f"{found[0].folder.parent}: {len(found)} run{'s' if len(found) > 1 else ''}"
    if statuses:
        title += f", {len(shown)} of them {' or '.join(statuses)}"
    out = Table(title=title, title_justify="left")
    # Streams that have a seed of their own in some run.
    entries = [one.entry for one in found]
    own = [s for s in entries[0].seeds if any(r.seeds[s] != r.config["seed"] for r in entries)]
    for name in (
        "run",
        *short_keys(columns_of(table)),
        "seed",
        *(f"seeds.{stream}" for stream in own),
        "status",
        "done",
        "seconds",
        "error",
    ):
        out.add_column(name, no_wrap=name == "run")
    for (_, record, damaged), one in shown:
        colour = "red" if damaged else COLOURS.get(record.status, "cyan")
        out.add_row(
            record.run_id,
            *(setting(one["setting"][key]) for key in columns_of(table)),
            str(record.config["seed"]),
            *(str(record.seeds[stream]) for stream in own),
            Text(f"{record.status}, damaged" if damaged else record.status, colour),
            f"{record.steps_done}/{record.config['trainer']['steps']}",
            f"{record.cost.total_seconds:.1f}",
            record.error or record.stopped_early or "",
        )
    whole(console(), out, ("seconds",))


def in_order(
    found: Sequence[Checked], table: dict[str, Any]
) -> list[tuple[Checked, dict[str, Any]]]:
    """Return runs with their rows in `compare.table`, by setting and seed."""
    return sorted(
        zip(found, table["runs"], strict=True),
        key=lambda one: (
            [order(one[1]["setting"][key]) for key in table["varied"]],
            one[0].entry.config["seed"],
            sorted(one[0].entry.seeds.items()),
        ),
    )


def columns_of(table: dict[str, Any]) -> list[str]:
    """Varied keys worth a column: where model.name tells runs apart, model.path need not."""
    settings = [one["setting"] for one in table["runs"]]

    def is_told_by(label: str, key: str) -> bool:
        pairs = {(repr(one[label]), repr(one[key])) for one in settings}
        return len(pairs) == len({first for first, _ in pairs})

    labels = {key.partition(".")[0]: key for key in table["varied"] if key.endswith(".name")}
    return [
        key
        for key in table["varied"]
        if (label := labels.get(key.partition(".")[0])) in (None, key)
        or not is_told_by(str(label), key)
    ]
