"""Runs `lm-server serve` as a node of BRAND: its flags, parameters, states, and the graph's Redis.

Parameters: `lm`, the model folder, and `options`, further options of `lm-server serve` as a list
(docs/realtime.md).
"""

from __future__ import annotations

import argparse

from lm_server.client import brand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    brand.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT."""
    from lm_server.commands import serve
    from lm_server.process import CommandParser

    node = brand.Node.from_arguments(args)
    with node.running():
        parameters = node.first_parameters()
        options = parameters.get("options", [])
        if not isinstance(parameters.get("lm"), str) or not isinstance(options, list):
            raise brand.BrandError(
                f"the parameters of {node.nickname!r} are {sorted(parameters)}; needed lm, a model "
                "folder of `lm-server build`, and where wanted options, a list"
            )
        parser = CommandParser(prog=node.nickname)
        serve.add_arguments(parser)
        given = ["--lm", parameters["lm"], "--redis", node.url, *map(str, options)]
        return serve.run(parser.parse_args(given), ready=lambda: node.state("NODE_READY"))
