"""Exported model, opened for scoring in one process. It needs neither TorchRec nor DeepSpeed.

::

    model.safetensors   tables.NAME [rows, dim], dense.PARAMETER and buffers.BUFFER of the network; for a dynamic table
                        also ids.NAME.id and ids.NAME.seen [rows]: the id of each row (no id where seen is 0)
    config.json         the job's settings
    features/           vocabularies and standardisation (trainer/data/features/fit.py)
    search.pt           search vectors, for models with histories that are searched by dot product
    checksums.json      size and CRC-32 of each file; all of them are verified when the model is opened
    README.md, score_one.py, inputs.json, ...   the guide for other programs (trainer/serving/export_guide.py)
    dataset/            the part of the dataset that scoring reads, with checksums of its own (--with-dataset)
    codes/              the code files of the model, which may be replaced by later ones (--with-dataset)
    vectors/NAME/       the tables of pre-trained vectors, which have hashes of their own (--with-dataset)
    export.json         checkpoint, dataset, precision and table shapes (trainer/serving/export.py)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modules.ranker import Ranker
from trainer.checkpoint.model_index import load_tensors
from trainer.checkpoint.model_state import list_differences
from trainer.checkpoint.run_directory import warn_of_accepted
from trainer.config.ranker import JobConfig
from trainer.config.toml import validate_stored
from trainer.console.errors import UserError
from trainer.data.features.code_inputs import open_codes
from trainer.data.features.content_inputs import open_reader
from trainer.data.features.content_tables import carried_tables, inside_dataset
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.fitted_codes import carried_codes, check_dataset
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace, stored_space
from trainer.data.format.carried_dataset import SCORING_FILES, dataset_of
from trainer.data.format.dataset import Dataset
from trainer.engine.build_ranker import build_ranker
from trainer.runtime.checksums import verify_checksums
from trainer.runtime.stored_files import open_regular, read_json_object
from trainer.semantic_ids.store_address import open_existing_store
from trainer.sparse.dynamic_ids import DynamicIds

SCHEMA = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FEATURES = "features"
SEARCH = "search.pt"
ORIGIN = "export.json"
CARRIED = "dataset"
"""Folder with the part of the dataset that scoring reads, if the export carries it."""
CODES = "codes"
"""Folder with the code files of the model, if the export carries the dataset."""
VECTORS = "vectors"
"""Folder with the tables of pre-trained vectors, if the export carries the dataset."""
ID_COLUMNS = ("id", "seen")
"""Columns that an export keeps of a dynamic table's ids: enough to look ids up, not to admit new ones."""


@dataclass(frozen=True)
class ExportedModel:
    """Model with whole tables, on the CPU.

    Attributes:
        config: settings of the job that trained the model.
        data: dataset that features, histories and statistics come from.
        features: map from stored rows to the model's inputs.
        tables: name -> ``[rows, dim]`` float32, mapped from the file.
        ranker: dense network, in the precision that it was trained in.
        dynamic_ids: name of a dynamic table -> its map from id to row; ids without a row read row 0.
        space: vectors that histories are searched with; None if no history is searched.
    """

    config: JobConfig
    data: Dataset
    features: FeatureMap
    tables: dict[str, Tensor]
    ranker: Ranker
    dynamic_ids: dict[str, DynamicIds]
    space: SearchSpace | None

    @torch.no_grad()
    def logits(self, batches: Iterable[PackedBatch]) -> Iterator[Tensor]:
        """Yield the logits of each batch, ``[rows, behaviours]`` float32."""
        lookups = {lookup.name: lookup for lookup in self.features.lookups}
        layout = self.features.layout
        for packed in batches:
            embedded, lengths = {}, {}
            for group in packed.ids(layout):
                of_rows = group.lengths.view(len(group.keys), packed.rows)
                for place, key in enumerate(group.keys):
                    ids = group.values[group.offsets[place] : group.offsets[place + 1]]
                    table = lookups[key].table
                    if table in self.dynamic_ids:
                        ids = self.dynamic_ids[table].find(ids).clamp(min=0)
                    embedded[key] = self.tables[table][ids]
                    if lookups[key].length is None:
                        lengths[key] = of_rows[place]
            yield self.ranker(embedded, lengths, packed.columns(layout)["dense"], packed.content(layout))


def is_export(directory: str | Path) -> bool:
    """True if a directory is an exported model rather than a run."""
    return (Path(directory) / ORIGIN).is_file()


def open_export(directory: str | Path, data_path: str | None = None) -> ExportedModel:
    """Open a directory that ``limelight export`` wrote, with a dataset.

    Args:
        directory: the export.
        data_path: dataset; None for the one that the export carries, or else the one that the model was trained on.

    Raises:
        UserError: a file is missing, damaged or of a newer version, or the model does not fit the dataset.
    """
    model_dir = Path(directory)
    verify_checksums(model_dir, (ORIGIN, CONFIG, WEIGHTS, SEARCH))
    origin = _read_json(model_dir / ORIGIN)
    schema, precision = origin.get("schema_version"), origin.get("precision")
    if type(schema) is not int or precision not in ("float32", "bfloat16"):
        raise UserError(f"{model_dir / ORIGIN}: damaged; repeat `limelight export RUN OUT`")
    if schema > SCHEMA:
        schema = f"schema {schema}; this one reads up to {SCHEMA}"
        raise UserError(f"{model_dir / ORIGIN}: written by a newer version ({schema})")
    config = validate_stored(JobConfig, _read_json(model_dir / CONFIG), str(model_dir / CONFIG))
    carried = model_dir / CARRIED
    if data_path is None and carried.is_dir():
        data_path = str(carried)
    carry = f" (scoring reads {SCORING_FILES}), or repeat `limelight export` with --with-dataset, which copies them"
    path = dataset_of(model_dir, config.data.path, data_path, carry)
    own, sets = carried_tables(config.features, model_dir / VECTORS), config.features.codes
    moved: frozenset[str] = frozenset()
    carried_sets = carried_codes(sets, model_dir / CODES)
    if path != str(carried):
        other, moved = inside_dataset(config.features, config.data.path, path)
        own = own.model_copy(update={"content": {**own.content, **{name: other.content[name] for name in moved}}})
        # A file of the other dataset comes before the copy of the export.
        carried_sets |= {name: code_set for name, code_set in other.codes.items() if code_set != sets[name]}
        check_dataset(carried_sets, config.data.path, path)
    warn_of_accepted(config, model_dir)
    accepted = own.content if config.resume.allow_new_data else moved
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": path}), "features": own})
    data = Dataset.open(path, config.data.on_corrupt)
    data.verify()
    fitted = FittedFeatures.load(model_dir / FEATURES)
    config = config.model_copy(update={"features": config.features.model_copy(update={"codes": carried_sets})})
    codes = open_codes(config.features, fitted.codes, open_existing_store)
    content = open_reader(config.features, path, fitted.content, accepted=accepted)
    features = FeatureMap(data.spec, config.features, fitted, config.data.behaviours, codes, content)
    ranker = build_ranker(config, features, config.model.kind).to(getattr(torch, precision)).eval()
    found = _read_weights(model_dir / WEIGHTS)
    tensors: dict[str, Tensor] = {f"dense.{name}": parameter for name, parameter in ranker.named_parameters()}
    tensors |= {f"buffers.{name}": buffer for name, buffer in ranker.named_buffers()}
    expected: dict[str, tuple[int, ...]] = {
        f"tables.{table.name}": (table.rows, table.dim) for table in features.tables
    }
    dynamic = [table for table in features.tables if table.dynamic]
    expected |= {f"ids.{table.name}.{column}": (table.rows,) for table in dynamic for column in ID_COLUMNS}
    expected |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differences = list_differences({name: tuple(tensor.shape) for name, tensor in found.items()}, expected)
    if differences:
        raise UserError(f"{model_dir / WEIGHTS}: the tensors do not fit the model of {CONFIG}: {differences}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
    tables = {table.name: found[f"tables.{table.name}"] for table in features.tables}
    dynamic_ids = {table.name: DynamicIds(table, 0, table.rows) for table in dynamic}
    for name, ids in dynamic_ids.items():
        for column in ID_COLUMNS:
            ids.columns[column].copy_(found[f"ids.{name}.{column}"])
    return ExportedModel(
        config,
        data,
        features,
        tables,
        ranker,
        dynamic_ids,
        stored_space(load_tensors(model_dir / SEARCH)) if features.needs_space else None,
    )


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        open_regular(file).close()
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: damaged ({' '.join(str(error).split())}); repeat `limelight export RUN OUT`"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
