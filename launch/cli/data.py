"""``limelight data``: make a dataset, or look at one. Imports of a command's work wait until it is asked for."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from trainer.console.errors import UserError
from trainer.console.job_arguments import add_command
from trainer.console.progress import Phases
from trainer.runtime.malloc import keep_freed_memory

if TYPE_CHECKING:
    from trainer.data.format.schema import DatasetSpec

_UNITS = {"simulating": "blocks", "writing rows": "rows", "reading files": "bytes"}

_EVENTS_DESCRIPTION = """\
Turn a log of your own (Parquet or CSV) into a dataset. A TOML file says what its columns mean:

  layout = "exposures"               # a line is an exposure with its outcomes; "events": a line is one event
  timezone = "Asia/Shanghai"         # of days, and of times that carry no offset
  [columns]
  user_id = "uid"                    # canonical name = your column
  author_id = "anchor"
  item_id = "room"
  time = "ts"                        # an integer in time_unit (default "ms"), or ISO 8601
  play_ms = "watched_ms"
  [domain]
  constant = "live"                  # or: column = "kind", video = ["1"], live = ["2", "3"]
  [behaviours]                       # in label order
  click = {column = "clicked", at = "start"}
  gift = {column = "gift_price", value = true}

All keys, and the layout "events", are described at the top of trainer/data/importers/events.py.
"""


def add_data_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb ``data`` and its commands; ``run(arguments)`` of the parsed arguments returns the exit status."""
    data = subparsers.add_parser(
        "data", help="make a dataset, or look at one", description="Make and look at datasets."
    )
    commands = data.add_subparsers(metavar="COMMAND", required=True)

    simulate = add_command(
        commands,
        "simulate",
        "a simulated world with known truth",
        "Simulate users of short videos and live rooms and write their log as a dataset. The true probability of\n"
        "every behaviour is kept beside the log, in files that no training reads.",
        "limelight data simulate data/world --users 20000 --days 7 --partitions 8 --seed 1",
    )
    simulate.add_argument("out", metavar="OUT", help="dataset to make; must not exist")
    simulate.add_argument(
        "--world",
        choices=("everyday", "cross"),
        default="everyday",
        help="everyday: many users for some days; cross: histories of up to 10,000 visits, in which each of five "
        "searches finds what the others do not, such as --users 400 --days 60 (default: %(default)s)",
    )
    simulate.add_argument("--users", type=int, default=20_000, metavar="N", help="users (default: %(default)s)")
    simulate.add_argument("--days", type=int, default=7, metavar="D", help="days (default: %(default)s)")
    _add_partitions(simulate)
    simulate.add_argument("--seed", type=int, default=1, metavar="S", help="of the world (default: %(default)s)")
    simulate.add_argument(
        "--texts", action="store_true", help="with texts of videos, rooms and comments, and time spent in comments"
    )
    simulate.set_defaults(run=_simulate)

    importing = commands.add_parser("import", help="a published or your own log", description="Import a log.")
    sources = importing.add_subparsers(metavar="SOURCE", required=True)
    kuairand = add_command(
        sources,
        "kuairand",
        "KuaiRand-Pure, -1K or -27K",
        "Import KuaiRand as its authors publish it (Gao et al., CIKM 2022; https://zenodo.org/records/10439422).",
        "limelight data import kuairand downloads/KuaiRand-Pure data/kuairand",
    )
    kuairand.add_argument("src", metavar="SRC", help="the unpacked folder, or the folder data/ in it")
    kuairand.add_argument("out", metavar="OUT", help="dataset to make; must not exist")
    _add_partitions(kuairand)
    kuairand.add_argument("--random", action="store_true", help="with the randomly exposed videos of log_random_*")
    kuairand.set_defaults(run=_import_kuairand)

    kuailive = add_command(
        sources,
        "kuailive",
        "KuaiLive: live rooms with exposures",
        "Import KuaiLive as its authors publish it (https://zenodo.org/records/16565801; not for commercial use).\n"
        "What is left out, so that no feature knows the future: trainer/data/importers/kuailive.py.",
        "limelight data import kuailive downloads/KuaiLive data/kuailive",
    )
    kuailive.add_argument("src", metavar="SRC", help="the unpacked folder")
    kuailive.add_argument("out", metavar="OUT", help="dataset to make; must not exist")
    _add_partitions(kuailive)
    kuailive.set_defaults(run=_import_kuailive)

    both = add_command(
        sources,
        "kuailive-m3",
        "KuaiLive-M3: live rooms and short videos, with vectors and texts",
        "Import KuaiLive-M3 as its authors publish it (https://huggingface.co/datasets/imgkkk2004/KuaiLive-M3). What\n"
        "is left out, so that no feature knows the future: trainer/data/importers/kuailive_m3.py.",
        "limelight data import kuailive-m3 downloads/KuaiLive-M3 data/kuailive-m3",
    )
    both.add_argument("src", metavar="SRC", help="the downloaded folder")
    both.add_argument("out", metavar="OUT", help="dataset to make; must not exist")
    _add_partitions(both)
    both.set_defaults(run=_import_kuailive_m3)

    kuaicomt = add_command(
        sources,
        "kuaicomt",
        "KuaiComt: videos, comments, staytimes",
        "Import KuaiComt as its authors publish it (https://github.com/lyingCS/KuaiComt.github.io). Its files may be\n"
        "separated by commas or tabs.",
        "limelight data import kuaicomt downloads/KuaiComt data/kuaicomt",
    )
    kuaicomt.add_argument("src", metavar="SRC", help="the unpacked folder")
    kuaicomt.add_argument("out", metavar="OUT", help="dataset to make; must not exist")
    _add_partitions(kuaicomt)
    kuaicomt.set_defaults(run=_import_kuaicomt)

    events = add_command(
        sources,
        "events",
        "your own Parquet or CSV",
        _EVENTS_DESCRIPTION,
        "limelight data import events logs/ data/mine --mapping map.toml",
    )
    events.add_argument("src", metavar="SRC", help="a .parquet, .csv or .csv.gz file, or a folder of them")
    events.add_argument("out", metavar="OUT", help="dataset to make; must not exist")
    events.add_argument("--mapping", required=True, metavar="MAP.toml", help="what the columns mean")
    _add_partitions(events)
    events.set_defaults(run=_import_events)

    describe = add_command(
        commands,
        "describe",
        "what a dataset holds",
        "Print counts, time span, behaviour rates, history lengths, cardinalities and the balance of the partitions.",
        "limelight data describe data/world --json",
    )
    describe.add_argument("path", metavar="PATH", help="dataset, a directory or an fsspec URL")
    describe.add_argument("--json", action="store_true", help="print JSON instead of a table")
    describe.set_defaults(run=_describe)


def _add_partitions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--partitions",
        type=int,
        default=8,
        metavar="P",
        help="partitions of the users, at least as many as ranks will train (default: %(default)s)",
    )


def _simulate(options: argparse.Namespace) -> int:
    from trainer.data.simulator.cross.write_dataset import simulate_cross
    from trainer.data.simulator.write_dataset import simulate

    if options.texts and options.world == "cross":
        raise UserError("--texts: the world `cross` has no texts; leave it out, or take --world everyday")
    keep_freed_memory()
    with Phases(_UNITS) as progress:
        sizes = options.users, options.days, options.partitions, options.seed
        if options.world == "cross":
            spec = simulate_cross(options.out, *sizes, progress)
        else:
            spec = simulate(options.out, *sizes, progress, texts=options.texts)
    return _made(options.out, spec)


def _import_kuairand(options: argparse.Namespace) -> int:
    from trainer.data.importers.kuairand import import_kuairand

    keep_freed_memory()
    with Phases(_UNITS) as progress:
        spec = import_kuairand(options.src, options.out, options.partitions, random=options.random, progress=progress)
    return _made(options.out, spec)


def _import_kuailive(options: argparse.Namespace) -> int:
    from trainer.data.importers.kuailive import import_kuailive

    keep_freed_memory()
    with Phases(_UNITS) as progress:
        spec = import_kuailive(options.src, options.out, options.partitions, progress)
    return _made(options.out, spec)


def _import_kuailive_m3(options: argparse.Namespace) -> int:
    from trainer.data.importers.kuailive_m3 import import_kuailive_m3

    keep_freed_memory()
    with Phases(_UNITS) as progress:
        spec = import_kuailive_m3(options.src, options.out, options.partitions, progress)
    return _made(options.out, spec)


def _import_kuaicomt(options: argparse.Namespace) -> int:
    from trainer.data.importers.kuaicomt import import_kuaicomt

    keep_freed_memory()
    with Phases(_UNITS) as progress:
        spec = import_kuaicomt(options.src, options.out, options.partitions, progress)
    return _made(options.out, spec)


def _import_events(options: argparse.Namespace) -> int:
    from trainer.data.importers.events import import_events

    keep_freed_memory()
    with Phases(_UNITS) as progress:
        spec = import_events(options.src, options.out, options.mapping, options.partitions, progress)
    return _made(options.out, spec)


def _describe(options: argparse.Namespace) -> int:
    from trainer.data.format.description import describe, format_description

    description = describe(options.path)
    print(json.dumps(description, indent=1) if options.json else format_description(description))
    return 0


def _made(out: str, spec: DatasetSpec) -> int:
    users = spec.ids["user"].count
    print(f"{out}: {spec.rows:,} training rows of {users:,} users in {spec.partitions} partitions")
    print(f"look at it: limelight data describe {out}")
    return 0
