"""Steps of ``benchmarks/speed/gpu.py`` for streams: histories that grow on the device."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.speed.gpu_job_steps import on_both_devices
from benchmarks.speed.gpu_steps import (
    DeviceStopwatch,
    Parts,
    Step,
    count_differing_ids,
    device,
    searched_model,
    waits_of,
)


def stream_searches(small: bool) -> Parts:
    """Let long histories grow, search them on the host and on the device, and compare all ids of the batches."""
    import torch

    from trainer.data.format.growing_history import VISIT_COLUMNS, GrowingHistories, ranges
    from trainer.data.format.schema import DOMAINS
    from trainer.data.format.shards import read_rows
    from trainer.data.loading.batch import unpack
    from trainer.ranking.growing_device_histories import open_growing_histories

    users, days, size, portions = (20, 10, 64, 4) if small else (400, 60, 2048, 20)
    with tempfile.TemporaryDirectory() as scratch:
        config, data, features, space = searched_model(scratch, users, days, "features.search.device=device")
        rows, stored = read_rows(config.data.path, data.spec), data.histories
        # The last third of the requests is the stream.
        since, end = np.quantile(rows["request_ms"], [2 / 3, 1]).astype(np.int64).tolist()
        user_id, _ = stored.lengths()
        first, stop = (ends.reshape(-1) for ends in stored.runs(user_id, np.full(len(user_id), end)))
        at, lengths = ranges(first, stop - first), stop - first
        visits = {name: stored.column(name)[at] for name in VISIT_COLUMNS if name not in ("user_id", "domain")}
        visits["user_id"] = np.repeat(np.repeat(user_id, len(DOMAINS)), lengths)
        visits["domain"] = np.repeat(np.tile(np.arange(len(DOMAINS), dtype=np.uint8), len(user_id)), lengths)
        new = np.flatnonzero(visits["request_ms"] >= since)
        new = new[np.argsort(visits["known_ms"][new], kind="stable")]
        visits = {name: visits[name][new] for name in VISIT_COLUMNS}

        histories = GrowingHistories(stored, lambda user: np.ones(len(user), bool), [0], since)
        stream = torch.cuda.Stream() if device().type == "cuda" else None
        world: Any = SimpleNamespace(device=device(), first_problem=lambda problem: problem)
        engine: Any = SimpleNamespace(allocate=lambda: 0, copy_stream=stream)
        copy = open_growing_histories(config, features, histories, space, world, engine)
        assert copy is not None
        watch = DeviceStopwatch("update", "host", "host without searches", "device")
        watch.run("update", copy.update)
        first_copy = watch.seconds["update"].pop()
        yield {"visits at first": int(histories.lengths()[1].sum()), "seconds of first copy": first_copy}
        differing = 0
        waits: dict[str, int | None] = {"update": None, "device": None}
        times = np.linspace(since, end, portions + 1).astype(np.int64).tolist()
        for begin, until in itertools.pairwise(times):
            due = (visits["known_ms"] >= begin) & (visits["known_ms"] < until)
            histories.append(0, {name: column[due] for name, column in visits.items()}, until)
            if until == end and device().type == "cuda":
                # The last one is counted, and not timed.
                waits["update"] = waits_of(copy.update)
            else:
                watch.run("update", copy.update)
            asked = np.flatnonzero((rows["request_ms"] >= begin) & (rows["request_ms"] < until))[:size]
            of_batch = {name: column[asked] for name, column in rows.items()}

            def pack(searched: Any, of_batch: Any = of_batch) -> Any:
                return features.pack(of_batch, histories, of_batch["request_ms"], searched)

            whole, left = (
                unpack(replace(watch.run(name, partial(pack, searched)), version=0), features.layout, {})
                for name, searched in (("host", space.at(0)), ("host without searches", copy.places))
            )
            there = left.to(device())
            found = watch.run("device", partial(copy.complete, there))
            waits["device"] = waits_of(partial(copy.complete, there))
            differing += count_differing_ids(found, whole)
        yield {
            **{"rows of a batch": size, "batches": portions, "ids_that_differ": differing, "waits": waits},
            **{"visits at last": int(histories.lengths()[1].sum()), "places at last": histories.places},
            "seconds": watch.fastest(),
        }


def searched_stream(small: bool) -> Parts:
    """Train ``configs/moment.toml``, a stream, with searches on a CPU and on the device, and compare both."""
    import fbgemm_gpu  # noqa: F401 - says that it is missing
    import torchrec  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        settings = ['features.history.short.search="top"', 'features.history.live.search="top"']
        settings += ['features.search.device="device"', "features.search.refresh_steps=20"]
        # A step for each slice would take minutes.
        settings += ["stream.slice_seconds=600", "stream.flush_seconds=3600"]
        days = (
            ("2024-03-05", "2024-03-05T10:00", "2024-03-06")
            if small
            else ("2024-03-08", "2024-03-08T18:00", "2024-03-10")
        )
        keys = ("data.train_until", "stream.until", "data.eval_from")
        settings += [f"{key}={time}" for key, time in zip(keys, days, strict=True)]
        yield from on_both_devices(scratch, small, *settings, job="configs/moment.toml")


STEPS = {"stream_searches": Step(stream_searches, 90), "searched_stream": Step(searched_stream, 240)}
"""Name -> step."""
