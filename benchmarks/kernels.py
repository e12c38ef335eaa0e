"""The cost of reflora's kernels on true shapes, without a model: `python -m benchmarks.kernels PROGRAM --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import eigh, host, profile, scaling, step, unused

PROGRAMS = (step, scaling, eigh, host, profile)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    programs = parser.add_subparsers(dest="program", metavar="PROGRAM", required=True)
    for program in PROGRAMS:
        summary = (program.__doc__ or "").split("\n")[0]
        own = programs.add_parser(program.NAME, help=summary, description=program.__doc__)
        program.add_arguments(own)
        own.set_defaults(run=program.run, parser=own)
    options = parser.parse_args(argv)
    options.run(options.parser, options)


if __name__ == "__main__":
    unused.leave_out()
    main()
