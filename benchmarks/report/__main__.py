"""Write the generated documents: ``docs/results.md``, ``docs/config.md`` and the table of results in ``README.md``.

    python -m benchmarks.report            # write them
    python -m benchmarks.report --check    # exit with 1 and name those that are stale

Figures come from ``benchmarks/results``, sentences from ``benchmarks/report/templates``, keys of job files from the
models in ``trainer/config``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report.pages import config_page, readme_table, results_page, with_readme_table
from trainer.console.outputs import local_argument

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def documents(root: Path, results: Path) -> dict[str, str]:
    """Return the path below ``root`` and the fresh text of every generated document.

    Raises:
        ValueError: README.md has no place for its table.
    """
    readme = (root / "README.md").read_text()
    return {
        "docs/results.md": results_page(results),
        "docs/config.md": config_page(),
        "README.md": with_readme_table(readme, readme_table(results)),
    }


def stale(root: Path, fresh: Mapping[str, str]) -> list[str]:
    """Return the names of the documents that are missing below ``root`` or differ from their fresh text."""
    return [name for name, text in fresh.items() if not (root / name).exists() or (root / name).read_text() != text]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the documents, or check them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document is stale")
    parser.add_argument(
        "--root", type=local_argument, default=ROOT, help="directory of README.md and docs/ (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="measured results (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        fresh = documents(options.root, options.results)
    except ValueError as error:
        sys.exit(f"limelight: error: {error}")
    old = stale(options.root, fresh)
    if options.check and old:
        sys.exit(f"stale: {', '.join(old)}; run python -m benchmarks.report")
    for name in old:
        (options.root / name).parent.mkdir(parents=True, exist_ok=True)
        (options.root / name).write_text(fresh[name])
        print(f"written: {name}")


if __name__ == "__main__":
    main()
