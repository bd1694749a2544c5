"""Logs on standard error: lines for people, or JSON objects for programs."""

from __future__ import annotations

import argparse
import json
import logging

from lm_server.errors import shortened

FORMATS = ("text", "json")
_LINE = 4000
"""Bytes of a message, and of a traceback."""
_KNOWN = frozenset(vars(logging.makeLogRecord({})))


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, message, traceback, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = record.exc_text or self.formatException(record.exc_info)
        extra = {key: value for key, value in vars(record).items() if key not in _KNOWN}
        return json.dumps(line | extra, default=str)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --log-format."""
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default=FORMATS[0],
        help="of the log on standard error (default text)",
    )


def use(form: str) -> None:
    """Write logs in that format from now on, and cut what repeats its input."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_cut)
        if form == "json":
            handler.setFormatter(JsonLines())


def _cut(record: logging.LogRecord) -> bool:
    record.msg, record.args = shortened(record.getMessage(), _LINE), None
    if record.exc_info and not record.exc_text:
        record.exc_text = shortened(logging.Formatter().formatException(record.exc_info), _LINE)
    return True
