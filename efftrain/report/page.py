"""The HTML report: one file that needs nothing else, neither network nor scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from efftrain.report.figures import Figure
from efftrain.report.run import write_atomic


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        columns: Headings.
        rows: Cells, as many a row as there are columns.
        caption: Above the table.
        num_text_columns: So many columns from the left hold words; the others figures, set flush right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    num_text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """One part of a report: a heading, a few sentences, tables and figures."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: Heading and title of the page.
        lead: What was run and what came out, in a sentence or two.
        sections: In order.
        facts: Versions, hardware, seed: what a reader needs to repeat it.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)


def write_page(page: Page, path: Path) -> None:
    """Render ``page`` to ``path``, whole or not at all. Texts are escaped; figures are our own SVG."""
    environment = Environment(
        loader=PackageLoader("efftrain.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_atomic(path, environment.get_template("page.html").render(page=page))
