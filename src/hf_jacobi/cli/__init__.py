"""The command `hf-jacobi`."""

from __future__ import annotations

import argparse
import sys

from . import demo


COMMANDS = (demo,)


def main(argv: list[str] | None = None) -> int:
    """Runs `hf-jacobi COMMAND ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hf-jacobi", description="Decode many tokens per forward.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-jacobi {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
