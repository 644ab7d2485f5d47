"""``efftrain report RUN...``: runs side by side, as a table and as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from efftrain.cli.console import JsonOption, print_json, print_table, say


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html in the first run folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare finished runs: a table here, curves and bytes in report.html."""
    from efftrain.report.compare import comparison_page, comparison_table, read_run
    from efftrain.report.federated import read_federated_page
    from efftrain.report.page import write_page

    found = [read_run(path) for path in runs]
    path = out or runs[0] / "report.html"
    federated = len(found) == 1 and found[0].result.get("kind") == "federated"
    page = read_federated_page(found[0]) if federated else comparison_page(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, path)
    if as_json:
        print_json({"report": str(path), "runs": [{"path": str(run.path), **run.result} for run in found]})
        return
    from rich.markup import escape
    from rich.table import Table

    table = comparison_table(found)
    view = Table(*table.columns, box=None, pad_edge=False)
    for row in table.rows:
        view.add_row(*map(escape, row))  # a folder may be called "[red]"
    print_table(view)
    say(f"report written to {path}")
