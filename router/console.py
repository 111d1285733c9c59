"""What people see while something runs: on standard error, so that standard output stays for results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

OnProgress = Callable[[float, str], None]


@contextlib.contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Show one long task. Yields a function of (fraction from 0 to 1, what is being done).

    A bar on a terminal, which vanishes at the end; one line elsewhere, for logs.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(f"{title} ...", markup=False)
        yield lambda fraction, message: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=1.0)
        yield lambda fraction, message: bars.update(task, completed=fraction, description=f"{title}: {message}")
