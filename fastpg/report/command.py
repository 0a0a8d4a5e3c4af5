"""The command `fastpg report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REJECTED = 2
"""The exit code for input that cannot be used."""

EXAMPLE = """\
example:
  fastpg report out
  fastpg report out/ppo out/grpo --output comparison.html

The page needs no network. It is made from the files of the runs, also while they go on."""


def report(argv: Sequence[str]) -> int:
    """Run `fastpg report`.

    Args:
        argv: The arguments after it.

    Returns:
        The exit code: 0, or 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(
        "fastpg report",
        description="Write one HTML page about runs of `fastpg train`: curves, samples before and "
        "after, times, settings and versions; several runs side by side.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", nargs="+", type=Path, metavar="DIR", help="output_dir of a run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the first DIR)",
    )
    options = parser.parse_args(argv)
    try:
        # The packages that it is made with come with the trainer.
        from fastpg.report.page import write_page
        from fastpg.report.run import ReportError
    except ImportError as error:
        print(
            f"fastpg report needs {error.name}: install the trainer's packages with "
            "pip install '.[trainer]' in the clone of fastpg.",
            file=sys.stderr,
        )
        return REJECTED
    try:
        path = write_page(options.directory, options.output)
    except ReportError as error:
        print(f"fastpg report: {error}", file=sys.stderr)
        return REJECTED
    print(f"Written to {path}.")
    return 0
