"""The sentence as it grows, in a terminal. Plain lines where there is none."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from b2txt_jax.live.events import Began, Chosen, Final, Happening, Problem, Progress

_LEVELS = ((0.9, "bold green"), (0.6, "bold yellow"), (0.0, "bold red"))


def coloured(event: Final) -> Text:
    """Return the words of a final sentence, each with its confidence."""
    shown = Text()
    for word, confidence in event.answer.words:
        level = next((s for least, s in _LEVELS if (confidence or 0.0) >= least), "bold")
        shown.append(word, level if confidence is not None else "bold")
        if confidence is not None:
            shown.append(f" {confidence:.2f}", "dim")
        shown.append("  ")
    return shown if event.answer.words else Text("(nothing)", "dim")


class Terminal:
    """An output on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        if self._live:
            self._live.start()
        self._text = self._status = ""

    def show(self, event: Happening) -> None:
        """Draw the sentence in progress, and print what is final."""
        if isinstance(event, Began):
            self._text = ""
        elif isinstance(event, Progress):
            changed, self._text = event.text != self._text, event.text
            problems = ", ".join(f"{n} {name}" for name, n in event.health.problems.items())
            self._status = f"{1000 * event.delay:.0f} ms" + (f"; {problems}" if problems else "")
            if changed and not self._live:
                self._print(f"... {event.text}")
        elif isinstance(event, Final):
            self._text = ""
            total = event.answer.confidence
            self._print(
                Text.assemble(coloured(event), f" ({total:.2f})" if total is not None else "")
            )
            if event.truth is not None:
                self._print(Text(f"    said: {event.truth}", "dim"))
        elif isinstance(event, Chosen):
            self._print(f"{'corrected' if event.corrected else 'confirmed'}: {event.text}")
        elif isinstance(event, Problem):
            self._print(Text(f"warning: {event.text}", "yellow"))
        if self._live:
            shown = Group(Text(self._text or " ", "bold"), Text(self._status, "dim"))
            self._live.update(shown, refresh=True)

    def _print(self, what: Text | str) -> None:
        self._console.print(what, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Stop drawing."""
        if self._live:
            self._live.stop()
