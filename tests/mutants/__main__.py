"""Puts small bugs into the core, one at a time, and records which test finds each of them.

    python -m tests.mutants                          # 500 bugs; bugs that are in the file already are not tried again
    python -m tests.mutants --only modules/search    # bugs of these files only
    python -m tests.mutants --survivors              # once more those that no test has found
    python -m tests.mutants --count 0                # one of each file; bugs of lines that are gone are forgotten

The bugs are chosen mechanically with a seed (``tests.mutants.operators``) and go into a copy of the tree in a temporary
directory. Each result is written at once, so the command can be stopped and continued. The suite does not run this. It
takes about a minute for ten bugs on one core.
"""

from __future__ import annotations

import argparse
import compileall
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.mutants.operators import Mutant, chosen, has_meaning, mutants
from tests.mutants.runner import Outcome, TestRunner, by_file, copy_tree, preload
from tests.mutants.targets import EQUAL, LEFT_OUT, SLOW, TESTS
from tests.paths import ROOT
from trainer.console.progress import Progress
from trainer.console.run_log import start_log
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json

OUT = ROOT / "benchmarks" / "results" / "mutants.json"

Key = tuple[str, str, str, str, int]


def key(entry: Mapping[str, Any]) -> Key:
    """Return the identity of a bug in a result, which does not change when other lines of the file do."""
    return entry["file"], entry["function"], entry["original"], entry["mutant"], entry["number"]


def numbered(found: Iterable[Mutant]) -> dict[Key, Mutant]:
    """Return the bugs by their identity; equal bugs of equal lines in a function are numbered."""
    times: Counter[tuple[str, ...]] = Counter()
    result = {}
    for mutant in found:
        alike = (mutant.file, mutant.function, mutant.original, mutant.mutant)
        result[*alike, times[alike]] = mutant
        times[alike] += 1
    return result


def document(entries: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return the content of the result file."""
    equal = [entry for entry in entries if entry["found_by"] is None and entry["equal"]]
    found = [entry for entry in entries if entry["found_by"] is not None]
    return {
        "seed": seed,
        "tried": len(entries),
        "found": len(found),
        "equal": len(equal),
        "survived": len(entries) - len(found) - len(equal),
        "seconds": round(sum(entry["seconds"] for entry in entries), 1),
        "parts": _parts(entries),
        "mutants": sorted(entries, key=lambda entry: (entry["file"], entry["line"], entry["mutant"])),
        "environment": environment(1),
    }


def _survives(entry: Mapping[str, Any]) -> bool:
    return entry["found_by"] is None and not entry["equal"]


def _parts(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts of each package, such as ``trainer/engine``."""
    parts: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry["file"]):
        name = "/".join(entry["file"].split("/")[:-1][:2])
        counts = parts.setdefault(name, {"part": name, "tried": 0, "found": 0, "survived": 0, "equal": 0})
        counts["tried"] += 1
        counts["found" if entry["found_by"] is not None else "equal" if entry["equal"] else "survived"] += 1
    return list(parts.values())


def read_entries(out: Path, current: Mapping[Key, Mutant], root: Path) -> list[dict[str, Any]]:
    """Return earlier results whose line and test are still in the tree, with their line numbers of today."""
    if not out.exists():
        return []
    entries = [entry for entry in json.loads(out.read_text())["mutants"] if key(entry) in current]
    entries = [entry for entry in entries if _exists(entry["found_by"], root)]
    reasons = [EQUAL.get((entry["file"], entry["original"], entry["mutant"])) for entry in entries]
    lines = [current[key(entry)].line for entry in entries]
    return [
        {**entry, "line": line, "equal": reason} for entry, line, reason in zip(entries, lines, reasons, strict=True)
    ]


def _exists(test: str | None, root: Path) -> bool:
    """Return True if a test is in its file, or if this is another place where an error was met, or None."""
    if test is None or "::" not in test:
        return True
    file, _, name = test.partition("::")
    name = name.partition("[")[0].rpartition("::")[2]
    return (root / file).is_file() and re.search(rf"\bdef {name}\(", (root / file).read_text()) is not None


def entry_of(mutant: Mutant, number: int, outcome: Outcome) -> dict[str, Any]:
    """Return the entry of a bug in the result.

    ``checked`` becomes True when the test that has found it has passed without it; it is None if no test has found it.
    """
    return {
        "file": mutant.file,
        "line": mutant.line,
        "function": mutant.function,
        "number": number,
        "kind": mutant.kind,
        "original": mutant.original,
        "mutant": mutant.mutant,
        "found_by": outcome.found,
        "equal": EQUAL.get((mutant.file, mutant.original, mutant.mutant)),
        "checked": None if outcome.found is None else False,
        "tests": outcome.ran,
        "seconds": round(outcome.seconds, 2),
    }


def write_entries(out: Path, entries: Mapping[Key, Mapping[str, Any]], seed: int) -> None:
    """Write the results so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, document(list(entries.values()), seed))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="bugs to choose (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the choice (default: %(default)s)")
    parser.add_argument("--only", metavar="PATTERN", help="only bugs with this expression in `FILE FUNCTION: LINE`")
    parser.add_argument("--survivors", action="store_true", help="only bugs that no test has found so far, once more")
    parser.add_argument("--quick", action="store_true", help="without the tests on several ranks")
    parser.add_argument("--list", action="store_true", help="print the chosen bugs and run nothing")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.json", help="results (default: %(default)s)")
    return parser.parse_args(argv)


def run(
    root: Path,
    tests: Mapping[str, Sequence[str]],
    options: argparse.Namespace,
    slow: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Try the chosen bugs on a copy of ``root``, and write and return the results.

    Args:
        root: repository.
        tests: module -> its test files.
        options: of the command line.
        slow: module -> names of its slow tests.
    """
    with tempfile.TemporaryDirectory(prefix="limelight-mutants-") as work:
        copy = Path(work).resolve() / "tree"
        copy_tree(root, copy)
        sources = {file: (copy / file).read_bytes() for file in tests}
        by_module = {file: mutants(file, source) for file, source in sources.items()}
        current = numbered(mutant for found in by_module.values() for mutant in found)
        names = {mutant: name for name, mutant in current.items()}
        entries = {key(entry): entry for entry in read_entries(options.out, current, copy)}
        if options.survivors:
            wanted = [current[name] for name, entry in entries.items() if _survives(entry)]
        else:
            drawn = chosen(by_module, options.count, options.seed, lambda mutant: has_meaning(mutant, sources))
            wanted = [mutant for mutant in drawn if names[mutant] not in entries]
        if options.only:
            wanted = [m for m in wanted if re.search(options.only, f"{m.file} {m.function}: {m.original}")]
        # The server of a file's tests serves all of its bugs.
        wanted.sort(key=lambda mutant: mutant.file)
        if options.list:
            for mutant in wanted:
                print(f"{mutant.file}:{mutant.line} {mutant.original}\n    {mutant.mutant}")
            return document(list(entries.values()), options.seed)
        # Results of lines and tests that are no longer there go at once, also if nothing is tried.
        write_entries(options.out, entries, options.seed)
        for package in ("trainer", "modules"):
            compileall.compile_dir(copy / package, quiet=2, workers=1)
        preload()
        runner = TestRunner(copy, Path(work).resolve(), LEFT_OUT)
        passing = {entry["found_by"] for entry in entries.values() if entry["checked"]}
        left = wanted
        with Progress("mutants", len(wanted), "bugs") as progress:
            while True:
                for mutant in left:
                    existing = [file for file in tests[mutant.file] if (copy / file).exists()]
                    content = mutant.apply(sources[mutant.file])
                    last = (slow or {}).get(mutant.file, ())
                    outcome = runner.find(mutant.file, mutant.function, content, existing, not options.quick, last)
                    entries[names[mutant]] = entry_of(mutant, names[mutant][-1], outcome)
                    write_entries(options.out, entries, options.seed)
                    progress.advance(1, f"{mutant.file}:{mutant.line} found by {outcome.found}")
                    if outcome.found is None:
                        print(f"survived: {mutant.file}:{mutant.line}\n  - {mutant.original}\n  + {mutant.mutant}")
                runner.close()
                # A test that fails without a bug has found nothing.
                finders = {entry["found_by"] for entry in entries.values() if entry["found_by"] not in passing}
                failing = set()
                for of_file in by_file(sorted(filter(None, finders))).values():
                    failing |= runner.failing(of_file)
                    passing |= set(of_file) - failing
                    for entry in entries.values():
                        entry["checked"] = None if entry["found_by"] is None else entry["found_by"] in passing
                    write_entries(options.out, entries, options.seed)
                runner.left_out |= failing
                left = [current[name] for name, entry in entries.items() if entry["found_by"] in failing]
                if not left:
                    break
        return document(list(entries.values()), options.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Try bugs, and end with 1 if one survives without a reason."""
    start_log()
    result = run(ROOT, TESTS, parse(argv), SLOW)
    print("{tried} bugs: {found} found, {survived} survived, {equal} change nothing".format(**result))
    sys.exit(bool(result["survived"]))


if __name__ == "__main__":
    main()
