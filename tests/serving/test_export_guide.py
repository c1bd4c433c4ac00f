"""Tests of an export's guide: its plain script computes what Limelight computes, for every kind of model and input."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.data.code_files import codes_around, write_codes
from tests.data.small_visits import SPEC, build_dataset, make_visits
from tests.serving.plain_scores import plain_probabilities, row_documents
from trainer.config.load import load_job
from trainer.config.ranker import JobConfig
from trainer.data.features.content_tables import open_tables
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import fit_features
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.dataset import Dataset
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.time_selection import Selection
from trainer.engine.build_ranker import build_ranker
from trainer.runtime.checksums import CHECKSUMS, write_checksums
from trainer.serving.export_guide import README, SCRIPT, write_guide
from trainer.serving.exported_model import CONFIG, FEATURES, ORIGIN, SEARCH, WEIGHTS, open_export
from trainer.serving.scoring import score_candidates
from trainer.sparse.dynamic_ids import DynamicIds

HISTORIES = """features.history={
    latest={domain="video", length=4}, mixed={domain="both", length=5, require=["like", "click"]},
    author={domain="live", search="author", length=3}, top={domain="video", search="top", length=4}}"""
HISTORIES = " ".join(HISTORIES.split())
RICH = (HISTORIES, "features.tags=true", 'features.author_side=["style"]', "features.side.dim=4")
PAST = "features.past={topic={same='tag', domain='live'}, author={same='author'}, now={half_life_minutes=600}}"
CODES = (
    'features.codes.raw={file="CODES", dim=8, prefix_rows=7}',
    'features.codes.last={file="CODES", levels=2, tables="prefixes", history="none"}',
)
CONTENT = (
    'features.content.title={table="TABLES/items", dim=3, histories=true}',
    'features.content.person={table="TABLES/authors", of="author", dim=5}',
    'features.content.air={table="TABLES/segments", of="segment", dim=4, histories=true, reading="mean"}',
)
MODELS = {
    "content-din": ("model.kind=ple", *CONTENT),
    "content-twin": ("model.kind=cgc", "model.attention_kind=twin", *CONTENT),
    "content-alone": ("model.kind=shared_bottom", CONTENT[1], "features.history={}"),
    "codes-din": ("model.kind=ple", *CODES),
    "codes-twin": ("model.attention_kind=twin", 'features.codes.raw={file="CODES", init="normal"}'),
    "ple-din": ("model.kind=ple", "model.expert_layers=[[12, 8], [8], [6]]", "model.tower=[]"),
    "ple-multi_head": ("model.kind=ple", "model.attention_kind=multi_head", "features.author.ids=lookup", *RICH),
    "cgc-twin": ("model.kind=cgc", "model.attention_kind=twin", "features.item.dim=32", *RICH),
    "mmoe-hash": (
        *("model.kind=mmoe", PAST, "features.item.ids=hash", "features.item.rows=37", "features.user.ids=hash"),
        *("features.user.rows=1000", "model.attention=[8]", "features.clip=0.5", "score.exponents.like=2.0"),
    ),
    "shared_bottom-dynamic": (
        *(
            "model.kind=shared_bottom",
            "features.user.ids=dynamic",
            "features.user.rows=130",
            "model.attention_kind=twin",
        ),
        *("features.item.ids=dynamic", "features.item.rows=65", 'data.behaviours=["gift", "click"]'),
    ),
    "dcn": ("model.kind=dcn", "model.dcn_layers=2", "model.expert_layers=[[9, 7], [6]]"),
    "dcn-low_rank": (
        "model.kind=dcn",
        "model.dcn_layers=1",
        "model.dcn_rank=4",
        "model.attention_kind=multi_head",
        *RICH,
    ),
    "logistic": ("model.kind=logistic", PAST, 'features.rates=["like"]', 'features.exclude=["domain", "age", "price"]'),
    "without-histories": ("features.history={}", 'features.exclude=["user_id", "stat:*", "tab", "load"]'),
    "without-inputs": (
        *("model.kind=shared_bottom", "features.history={}"),
        'features.exclude=["stat:*", "domain", "tab", "age", "topic", "style", "price", "load", "wealth"]',
    ),
    "bfloat16": ("model.attention_kind=multi_head", *RICH),
}
"""Name of a model -> settings; together they have every network, attention, mapping of ids, and kind of input."""

VISITS = make_visits(5, 400, 90_000_000)

JOB = '[data]\npath = "PATH"\n[model]\nexpert_layers = [[8], [6]]\ntower = [5]\nheads = 2\nhead_dim = 3\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("guide")
    build_dataset(directory / "world", VISITS, spec=replace(SPEC, tag="topic"))
    codes = codes_around(VISITS)
    write_codes(directory / "codes.parquet", codes)
    write_tables(directory / "tables", directory / "world", codes)
    for name, settings in MODELS.items():
        write_export(directory / name, directory / "world", settings, "bfloat16" if name == "bfloat16" else "float32")
    return directory


def write_export(out: Path, data_path: Path, settings: tuple[str, ...], precision: str) -> None:
    """Write an export with random weights, as large as those of a trained model."""
    job = out.with_suffix(".toml")
    job.write_text(JOB.replace("PATH", str(data_path)))
    places = {"CODES": out.with_name("codes.parquet"), "TABLES": out.with_name("tables")}
    for name, place in places.items():
        settings = tuple(setting.replace(name, str(place)) for setting in settings)
    config = load_job(JobConfig, job, settings)
    data = Dataset.open(str(data_path))
    tables = open_tables(config.features)
    fitted = fit_features(data.spec, data.store, data.histories, config.features, Selection(), tables)
    features = FeatureMap(data.spec, config.features, fitted, config.data.behaviours)
    ranker = build_ranker(config, features, config.model.kind)
    draw = torch.Generator().manual_seed(7)
    tensors = {f"tables.{table.name}": torch.randn(table.rows, table.dim, generator=draw) for table in features.tables}
    for table in features.tables:
        if table.dynamic:
            ids = DynamicIds(table, 0, table.rows)
            known = np.unique(VISITS[f"{table.name}_id"])[:-2]
            for step in (1, 2, 3):
                ids.learn(torch.from_numpy(known), step)
            tensors |= {f"ids.{table.name}.{column}": ids.columns[column] for column in ("id", "seen")}
    for name, parameter in ranker.named_parameters():
        tensors[f"dense.{name}"] = parameter + 0.2 * torch.randn(parameter.shape, generator=draw)
    tensors |= {f"buffers.{name}": buffer for name, buffer in ranker.named_buffers()}
    out.mkdir()
    (out / FEATURES).mkdir()
    fitted.save(out / FEATURES)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out / WEIGHTS)
    (out / CONFIG).write_text(config.model_dump_json())
    origin: dict[str, Any] = {"schema_version": 1, "precision": precision, "kind": config.model.kind, "step": 1234}
    origin |= {"finished": False, "checkpoint": "/runs/a", "dataset": {"path": str(data_path)}}
    (out / ORIGIN).write_text(json.dumps(origin))
    if features.needs_space:
        vectors = {name: tensors[f"tables.{name}"].half() for name in config.features.search.tables}
        torch.save({"0": vectors}, out / SEARCH)
    write_guide(out, config, origin, WEIGHTS, FEATURES)
    write_checksums(out)


def write_tables(path: Path, dataset: Path, segments: CodeFile) -> None:
    """Write vectors of some items, authors and segments, and the segments into the dataset."""
    rng = np.random.default_rng(8)
    for name, ids, width, dtype in (
        ("items", np.arange(0, 9, 2), 6, "float16"),
        ("authors", np.arange(1, 5), 4, "float32"),
        ("segments", np.arange(0, len(segments.known_ms), 2), 5, "float16"),
    ):
        ContentVectors.write(path / name, ids, 10 * rng.standard_normal((len(ids), width)), dtype=dtype)
    columns = {name: getattr(segments, name) for name in ("item_id", "start_ms", "known_ms")}
    pq.write_table(pa.table(columns), dataset / "segments.parquet")
    items = pq.read_table(dataset / "items.parquet")
    known = [[0, 1, 3, 5, 8][at % 5] for at in range(len(items))]
    pq.write_table(items.append_column("author_id", pa.array(known, pa.int64())), dataset / "items.parquet")
    (dataset / CHECKSUMS).unlink()


def candidates() -> dict[str, np.ndarray]:
    """Return candidates of known and unknown users, authors and items, some before the first visit."""
    visits, rng = VISITS, np.random.default_rng(3)
    n = 40
    columns = {name: rng.permutation(visits[name])[:n].astype(np.int64) for name in ("user_id", "author_id", "item_id")}
    columns["request_ms"] = np.sort(visits["request_ms"])[rng.integers(0, 400, n)] + 1
    columns["request_ms"][:3] -= 10**9
    columns["user_id"][5:7], columns["item_id"][6:9], columns["author_id"][8:10] = 2**62, 2**40, 12_345
    columns |= {"tab": rng.integers(0, 4, n).astype(np.int32), "load": rng.random(n).astype(np.float32)}
    return columns


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, np.ndarray]:
    """Return the probabilities of each export's own script, ``[candidates, behaviours]``."""
    rows = {
        folder / name: row_documents(open_export(folder / name), str(folder / "world"), candidates()) for name in MODELS
    }
    return dict(zip(MODELS, plain_probabilities(rows), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_script_computes_the_probabilities_of_limelight(
    name: str, folder: Path, plain: dict[str, np.ndarray]
) -> None:
    model = open_export(folder / name)
    table = score_candidates(model, str(folder / "world"), candidates())
    expected = np.stack([table[f"p_{behaviour}"].to_numpy() for behaviour in model.features.behaviours], 1)
    assert len(np.unique(expected.round(4), axis=0)) > 25, "the candidates must differ"
    # Rounding of float32; bfloat16 has 8 bits.
    np.testing.assert_allclose(plain[name], expected, rtol=0, atol=0.02 if name == "bfloat16" else 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_readme_names_every_tensor_and_every_file(name: str, folder: Path) -> None:
    text = (folder / name / README).read_text()
    tensors = text.partition("## Tensors")[2]
    for file in ("model.safetensors", "inputs.safetensors"):
        if (folder / name / file).exists():
            with safe_open(folder / name / file, "pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118
                    shape = opened.get_slice(tensor).get_shape()
                    (line,) = (line for line in tensors.splitlines() if line.startswith(f"| `{tensor}` |"))
                    assert f"| {shape} |" in line and not line.endswith("|  |"), line
        else:
            assert file not in text
    for path in (folder / name).iterdir():
        assert f"`{path.name}" in text or path.name == README, path.name
    rules = json.loads((folder / name / "inputs.json").read_text())
    for column in rules["dense"]:
        assert f"| `{column['name']}` |" in text
    assert ("{{" not in text and "\n\n\n" not in text.replace("\n\n\n", "\n\n", 0)) or "{{" not in text


@pytest.mark.parametrize("name", MODELS)
def test_the_script_is_short_and_plain(name: str, folder: Path) -> None:
    script = (folder / name / SCRIPT).read_text()
    imported = {line.split()[1].split(".")[0] for line in script.splitlines() if line.startswith(("import", "from"))}
    assert imported == {"json", "sys", "pathlib", "torch", "safetensors"}
    assert "{%" not in script and "{{" not in script
    assert max(len(line) for line in script.splitlines()) <= 120
    assert len([line for line in script.splitlines() if line.strip()]) < 100


def test_checksums_cover_the_guide(folder: Path) -> None:
    listed = json.loads((folder / "ple-multi_head" / "checksums.json").read_text())["files"]
    assert {README, SCRIPT, "inputs.json", "inputs.safetensors", "row.json"} <= set(listed)


def test_the_shipped_row_is_scored_and_a_wrong_value_is_refused(folder: Path) -> None:
    script, shipped = str(folder / "ple-din" / SCRIPT), folder / "ple-din" / "row.json"
    done = subprocess.run([sys.executable, "-I", script, shipped], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["click", "like", "gift"] and all(0 < p < 1 for p in found.values())
    probabilities, row = runpy.run_path(script)["probabilities"], json.loads(shipped.read_text())
    assert probabilities(row) == found
    with pytest.raises(SystemExit, match="feature age is 8; its values are 0 to 7"):
        probabilities({**row, "side": {"age": 8}})
