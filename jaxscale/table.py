"""A small table: text in a terminal, HTML in a notebook."""

import html
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of strings under a header. `str(table)` aligns them (numbers to the right); notebooks show HTML."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        right = [all(_numeric(row[i]) for row in self.rows) for i in range(len(self.header))]
        text = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)) for line in lines]
        return "\n".join([self.title, text[0].rstrip(), *(line.rstrip() for line in text[1:])])

    def _repr_html_(self) -> str:
        def cells(tag, row):
            return "".join(f"<{tag} style='text-align:left'>{html.escape(cell)}</{tag}>" for cell in row)

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        head = f"<thead><tr>{cells('th', self.header)}</tr></thead>"
        return f"<table><caption>{html.escape(self.title)}</caption>{head}<tbody>{body}</tbody></table>"


def human_bytes(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _numeric(cell: str) -> bool:
    return not cell or cell.lstrip("<>=-")[:1].isdigit()
