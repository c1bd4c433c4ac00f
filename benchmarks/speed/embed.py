"""Measure the speed of text embeddings, the gain of sorting by length, and the content of the vectors.

    python -m benchmarks.speed.embed --out benchmarks/results/embed.json
    python -m benchmarks.speed.embed --model DIR --adapter DIR

Without a model it makes a small Qwen2 with random weights, and a tokenizer of the texts. A text is one to ten comments
of a simulated world in a row (log-normal), since single ones are all of about the same length. On a CPU it uses one
thread and counts processor time, which other work on the machine hardly changes. It reports

* texts and tokens per second of one rank, and the share of padding, with texts in batches by length and as they come,
  by the size of a batch; all ways run one after another, ``--repeats`` times around, and the median counts;
* what a ridge regression finds in the vectors of single comments, by pooling, on comments of other videos than it was
  fitted on: R2 of their true quality, accuracy for their kind (of six), and R2 of the logarithm of their likes;
* the largest change of a value with its batch and with storage in float16;
* processor time and peak memory of ``limelight embed`` in a process of its own, starting included: for a new table, and
  for a table of which a share of the texts has changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import busy_seconds, make_parser, median_and_range, median_of, write_result
from launch.python_path import safe_environment
from modules.text_pooling import pool
from trainer.config.finetune import SmallConfig
from trainer.console.text_table import text_table
from trainer.data.format.text_schema import read_texts
from trainer.data.format.verification import record_dataset
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.embedding.learned_query import fit_query
from trainer.llm.embedding.text_encoder import EncodeCounts, Encoder, batches_by_length
from trainer.llm.models.adapter import load_adapter
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.llm.models.small_model import write_small_model

SHORT = ("--texts", "400", "--users", "100", "--repeats", "1")

KINDS = ("items", "comments", "segments", "authors")
RIDGE = (0.1, 1.0, 10.0, 100.0)
BATCH_TOKENS = (1_024, 4_096, 16_384)
CHANGED = (0.1, 0.01, 0.0)
"""Shares of a table's texts that change before it is renewed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.embed", __doc__)
    parser.add_argument("--model", default="", help="directory of a Qwen2-family model (default: a small random one)")
    parser.add_argument("--adapter", default="", help="directory of a peft adapter for it")
    parser.add_argument("--texts", type=int, default=4_000, help="texts of each measurement (default: %(default)s)")
    parser.add_argument("--users", type=int, default=600, help="users of the simulated world (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each speed (default: %(default)s)")
    parser.add_argument(
        "--template", default="configs/templates/embed.txt", help="prompt template (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        simulate(world, options.users, 2, 1, 1, texts=True)
        comments = read_texts(world, "comments")
        base = open_base(options.model, Path(folder) / "model", comments.column("text").to_pylist())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = base.load(bf16=device.type == "cuda")
        if options.adapter:
            model = load_adapter(base, model, Path(options.adapter))
        model.to(device)

        def encoder(tokens: int) -> Encoder:
            return Encoder(model, base.tokenizer, device, length=256, tokens=tokens)

        template = Template.read(options.template, dict.fromkeys(KINDS, frozenset({"text"})))
        long_texts = rows_of_texts(comments.column("text").to_pylist(), options.texts)
        ways = [(tokens, by_length) for tokens in BATCH_TOKENS for by_length in (True, False)]
        turns = [
            [measure(encoder(tokens), device, tokens, long_texts, by_length) for tokens, by_length in ways]
            for _ in range(options.repeats)
        ]
        report: dict[str, Any] = {
            "model": Path(options.model).name or "small, random weights",
            "adapter": Path(options.adapter).name,
            "parameters": sum(map(torch.numel, model.parameters())),
            "speed": [median_of(of_way) for of_way in zip(*turns, strict=True)],
            "content": content(encoder(4_096), world, template, options.texts),
            "moves": moves(encoder(4_096), encoder(1), long_texts[:200]),
            "renewal": renewal(base, options.adapter, world, Path(folder) / "tables"),
        }
    print(speed_table(report["speed"]))
    print(content_table(report["content"]))
    print(", ".join(f"{name}: {value:.1e}" for name, value in report["moves"].items()) + " at most")
    print(renewal_table(report["renewal"]))
    write_result(options.out, report)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Return the speeds as a table, by size and making of the batches."""
    lines = [
        (
            f"{row['tokens']:,} tokens, {'by length' if row['by_length'] else 'as they come'}",
            f"{row['texts_per_s']:,.0f}",
            "{least:,.0f} to {most:,.0f}".format(**median_and_range([run["texts_per_s"] for run in row["runs"]])),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['padding']:.1%}",
        )
        for row in rows
    ]
    return text_table(("batches", "texts/s", "spread", "tokens/s", "padding"), lines)


def content_table(rows: list[dict[str, Any]]) -> str:
    """Return what a ridge regression finds as a table, by pooling."""
    keys = ("quality_r2", "kind_accuracy", "log_likes_r2")
    lines = [(row["pooling"], *(f"{row[key]:.3f}" for key in keys)) for row in rows]
    return text_table(("pooling", "quality R2", "kind accuracy", "log likes R2"), lines)


def renewal_table(rows: list[dict[str, Any]]) -> str:
    """Return the costs of a renewal as a table, by the share of texts that changed."""
    lines = [
        (
            "all, no table" if row["changed"] is None else f"{row['changed']:.0%} of {row['texts']:,}",
            f"{row['embedded']:,}",
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
        for row in rows
    ]
    return text_table(("texts changed", "embedded", "processor s", "peak MB"), lines)


def open_base(path: str, small: Path, texts: list[str]) -> BaseModelFiles:
    """Open the model at ``path``, or a small one that is made at ``small``."""
    if not path:
        write_small_model(small, texts, SmallConfig(), seed=1, length=512)
    return BaseModelFiles.open(path or str(small))


def rows_of_texts(texts: list[str], count: int) -> list[str]:
    """Return ``count`` texts, each of one to ten others."""
    rng = np.random.default_rng(0)
    sizes = np.clip(np.rint(rng.lognormal(0.5, 0.8, count)), 1, 10).astype(int)
    return [" ".join(texts[one] for one in rng.integers(0, len(texts), size)) for size in sizes]


def measure(encoder: Encoder, device: torch.device, tokens: int, texts: list[str], by_length: bool) -> dict[str, Any]:
    """Return the speed with batches of texts of about the same length, or of neighbours."""
    encoder.vectors(texts[:64])
    encoder.counts = EncodeCounts()
    started = busy_seconds(device)
    ids = encoder.tokenise(texts)
    make = batches_by_length if by_length else batches_as_they_come
    for batch in make(np.array([len(one) for one in ids]), tokens):
        pool(*encoder.states([ids[one] for one in batch]), "last").cpu()
    took, counts = busy_seconds(device) - started, encoder.counts
    return {
        "tokens": tokens,
        "by_length": by_length,
        "texts_per_s": len(texts) / took,
        "tokens_per_s": counts.tokens / took,
        "padding": 1 - counts.tokens / counts.places,
    }


def batches_as_they_come(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Return neighbours in batches of the same size in tokens, padding included."""
    batches, first = [], 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and lengths[first : last + 1].max() * (last + 1 - first) <= tokens:
            last += 1
        batches.append(np.arange(first, last))
        first = last
    return batches


def content(encoder: Encoder, world: Path, template: Template, most: int) -> list[dict[str, Any]]:
    """Return what a ridge regression finds in the vectors of comments, by pooling."""
    comments, truth = read_texts(world, "comments"), pq.read_table(world / "truth/comments.parquet")
    rows = np.random.default_rng(0).permutation(comments.num_rows)[:most]
    texts = [template.fill("comments", text=text) for text in comments.column("text").take(rows).to_pylist()]
    quality, kind = (truth.column(name).to_numpy()[rows] for name in ("quality", "kind"))
    log_likes = np.log1p(comments.column("likes").to_numpy()[rows])
    fitted = comments.column("item_id").to_numpy()[rows] % 3 > 0
    results = []
    for pooling in ("last", "mean", "query"):
        query = torch.from_numpy(fit_query(encoder, world, template, 1)) if pooling == "query" else None
        encoder.pool_with(pooling, query)
        vectors = encoder.vectors(texts)
        kinds = ridge(vectors, np.eye(kind.max() + 1)[kind], fitted).argmax(axis=1)
        results.append(
            {
                "pooling": pooling,
                "quality_r2": r_squared(ridge(vectors, quality[:, None], fitted)[:, 0], quality[~fitted]),
                "kind_accuracy": float((kinds == kind[~fitted]).mean()),
                "log_likes_r2": r_squared(ridge(vectors, log_likes[:, None], fitted)[:, 0], log_likes[~fitted]),
            }
        )
    return results


def ridge(vectors: np.ndarray, targets: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return predictions ``[rows not fitted, k]``; the penalty is chosen on a fifth of the fitted rows."""
    mean, spread = vectors[fitted].mean(axis=0), vectors[fitted].std(axis=0) + 1e-6
    inputs = np.concatenate([(vectors - mean) / spread, np.ones((len(vectors), 1))], axis=1).astype(np.float64)
    rows = np.flatnonzero(fitted)
    part, rest = rows[::5], np.delete(rows, slice(None, None, 5))

    def fit(on: np.ndarray, penalty: float) -> np.ndarray:
        gram = inputs[on].T @ inputs[on] + penalty * np.eye(inputs.shape[1])
        return np.linalg.solve(gram, inputs[on].T @ targets[on])

    errors = [np.square(inputs[part] @ fit(rest, penalty) - targets[part]).sum() for penalty in RIDGE]
    predicted: np.ndarray = inputs[~fitted] @ fit(rows, RIDGE[int(np.argmin(errors))])
    return predicted


def r_squared(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the share of the variance that is explained."""
    return float(1 - np.square(predicted - true).mean() / true.var())


def moves(encoder: Encoder, alone: Encoder, texts: list[str]) -> dict[str, float]:
    """Return the largest difference of a value between a text in a batch and alone, and of float16 to float32."""
    vectors = encoder.vectors(texts)
    return {
        "batch": float(np.abs(vectors - alone.vectors(texts)).max()),
        "float16": float(np.abs(vectors - vectors.astype(np.float16)).max()),
    }


def renewal(base: BaseModelFiles, adapter: str, world: Path, directory: Path) -> list[dict[str, Any]]:
    """Make a table of all comments, and renew it after shares of their texts have changed."""
    job = directory.with_suffix(".toml")
    job.write_text(
        f'[data]\npath = "{world}"\nkinds = ["comments"]\n'
        f'[model]\npath = "{base.directory}"\nadapter = "{adapter}"\n'
        f'[embed]\ndirectory = "{directory}"\n'
    )
    rows = []
    for share in (None, *CHANGED):
        changed = change_comments(world, share or 0.0)
        command = [sys.executable, "-m", "trainer.embed", str(job)]
        process = subprocess.Popen(command, env={**safe_environment(os.environ), "OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
        # Popen must not wait for a process that has been waited for.
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        texts = read_texts(world, "comments", ["text"]).num_rows
        rows.append(
            {
                "changed": share,
                "texts": texts,
                "embedded": texts if share is None else changed,
                "seconds": used.ru_utime + used.ru_stime,
                "peak_bytes": used.ru_maxrss * 1024,
            }
        )
    return rows


def change_comments(world: Path, share: float) -> int:
    """Change the text of a share of the comments; return their number."""
    comments = read_texts(world, "comments")
    texts = comments.column("text").to_pylist()
    rows = np.random.default_rng(0).permutation(len(texts))[: round(share * len(texts))]
    for row in rows.tolist():
        texts[row] += " again"
    column = comments.schema.get_field_index("text")
    pq.write_table(
        comments.set_column(column, comments.schema.field(column), pa.array(texts)), world / "texts/comments.parquet"
    )
    # A job refuses a file that is not as it was recorded.
    record_dataset(str(world), lambda task, done, total: None)
    return len(rows)


if __name__ == "__main__":
    main()
