"""No file that Limelight opens can run code: payloads in every kind of file, and the calls that read them."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tests.checkpoint.stored_checkpoint import write_model
from tests.llm.tiny import write_base
from tests.nursery import Nursery
from tests.paths import ROOT
from tests.semantic_ids.segment_world import make_version
from trainer.checkpoint.manifest import file_entry, read_manifest, write_manifest
from trainer.checkpoint.model_index import load_tensors, read_index
from trainer.checkpoint.model_state import read_state
from trainer.checkpoint.reader import StoredModel
from trainer.console.errors import UserError
from trainer.data.features.fit import FittedFeatures
from trainer.data.format.content_vectors import ContentVectors
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.adapter import check_adapter
from trainer.llm.models.base_model import BaseModelFiles, refuse_code
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.checksums import write_checksums
from trainer.runtime.distributed import World
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.kmeans_state import read_state as read_fit_state

STORED = ROOT / "tests/checkpoint/stored/runs_0.1.tar.xz"


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload makes; a test fails if it is there at its end."""
    path = tmp_path / "code-was-run"
    yield path
    assert not path.exists(), "code from a file was run"


def test_the_payload_works(tmp_path: Path) -> None:
    marker = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def pickled_tensor_file(marker: Path) -> bytes:
    """Return the bytes that ``torch.save`` writes for a payload."""
    content = io.BytesIO()
    torch.save({"search": Payload(marker), "random": Payload(marker)}, content)
    return content.getvalue()


def one_line_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    write_model(directory, {"a": torch.ones(3)}, {})
    return directory


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    with World.join("cpu") as alone:
        yield alone.control


def test_an_index_is_unpickled_without_code(model: Path, marker: Path, group: dist.ProcessGroup) -> None:
    payload = pickle.dumps(Payload(marker))
    into = {"a": torch.zeros(3)}
    for content in (payload, payload.replace(b"posix", b"torch", 1), b"\x80\x04cos\nmkdir\n."):
        (model / ".metadata").write_bytes(content)
        for opened in (lambda: read_state(into, model, group), lambda: StoredModel(model), lambda: read_index(model)):
            assert str(model / ".metadata") in one_line_of(opened)


def changed_index(model: Path, change: Callable[[Any], object]) -> None:
    """Write a whole index again after a change."""
    index = pickle.loads((model / ".metadata").read_bytes())
    change(index)
    (model / ".metadata").write_bytes(pickle.dumps(index))


def test_bytes_of_an_index_are_never_unpickled(model: Path, marker: Path, group: dist.ProcessGroup) -> None:
    (model / "__0_0.distcp").write_bytes(pickled_tensor_file(marker))
    changed_index(model, lambda index: index.state_dict_metadata.update(a=BytesStorageMetadata()))
    assert "BytesStorageMetadata" in one_line_of(lambda: read_state({"a": torch.zeros(3)}, model, group))


def test_a_tensor_of_a_checkpoint_is_no_code(model: Path, marker: Path, group: dist.ProcessGroup) -> None:
    content = pickled_tensor_file(marker)
    for file in model.glob("*.distcp"):
        file.write_bytes(content)
    changed_index(
        model,
        lambda index: [vars(place).update(offset=0, length=len(content)) for place in index.storage_data.values()],
    )
    one_line_of(lambda: read_state({"a": torch.zeros(3)}, model, group))
    one_line_of(StoredModel(model).counters["a"].read)


def test_an_index_changes_no_class(model: Path) -> None:
    before = pickle.loads((model / ".metadata").read_bytes())
    attack = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(N}\x8c\x05wrong\x8c\x01xs\x86b."
    (model / ".metadata").write_bytes(attack.replace(b"(N}", b"N}"))
    one_line_of(lambda: read_index(model))
    assert not hasattr(type(before), "wrong")


def test_a_short_index_takes_little_memory(model: Path) -> None:
    # The C implementation would make room for 2 ** 32 remembered objects.
    (model / ".metadata").write_bytes(b"\x80\x04Nr\xf0\xff\xff\xff.")
    one_line_of(lambda: read_index(model))


def test_torch_files_hold_tensors_only(tmp_path: Path, marker: Path) -> None:
    file = tmp_path / "rank-00000.pt"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(1 << 20))
    for content in (pickled_tensor_file(marker), pickle.dumps(Payload(marker)), packed.getvalue(), b"", b"PK\x03\x04"):
        file.write_bytes(content)
        assert str(file) in one_line_of(lambda: load_tensors(file))


def test_arrays_are_no_code(tmp_path: Path, marker: Path) -> None:
    objects = np.array([Payload(marker)], object)
    np.save(tmp_path / "starts.npy", objects)
    np.savez(tmp_path / "vocabularies.npz", user=objects)
    (tmp_path / "features.json").write_text(json.dumps({"layout": {}, "table_rows": {}, "prior": []}))
    np.save(tmp_path / "ids-1.npy", objects)
    files = {"ids": "ids-1.npy", "vectors": "ids-1.npy", "texts": "ids-1.npy"}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "count": 1, "dim": 1, "files": files}))
    for opened in (Tokens.open, FittedFeatures.load, ContentVectors.open):
        one_line_of(lambda opened=opened: opened(tmp_path))


def test_a_codebook_and_its_codes_are_no_code(tmp_path: Path, marker: Path) -> None:
    """Whoever writes a file also writes its checksum."""
    version = make_version(tmp_path / "codebook", 4, 3)
    np.save(tmp_path / "codebook/centroids-1.npy", np.array([Payload(marker)], object))
    write_checksums(tmp_path / "codebook")
    one_line_of(lambda: CodebookVersion.open(tmp_path / "codebook"))
    for name in ("codebook.json", "centroids-2.npy", "checksums.json"):
        (tmp_path / "codebook" / name).write_bytes(pickle.dumps(Payload(marker)))
        if name != "checksums.json":
            write_checksums(tmp_path / "codebook")
        one_line_of(lambda: CodebookVersion.open(tmp_path / "codebook"))
    (tmp_path / "codes.parquet").write_bytes(pickle.dumps(Payload(marker)))
    one_line_of(lambda: read_codes(tmp_path / "codes.parquet", version))
    state = tmp_path / "state.npz"
    np.savez(state, about=np.array([Payload(marker)], object))
    one_line_of(lambda: read_fit_state(state, ""))


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, marker: Path) -> None:
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        directory = tmp_path / name.removesuffix(".json")
        directory.mkdir()
        (directory / "evil.py").write_text(code)
        (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        (directory / name).write_text(json.dumps({"model_type": "qwen2", "auto_map": {"AutoConfig": "evil.Config"}}))
        message = one_line_of(lambda directory=directory: BaseModelFiles.open(str(directory)))
        assert message.startswith(f"{directory / name}: ") and "auto_map" in message


def test_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/model.safetensors", "pytorch_model.bin", 7, None):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert str(index) in one_line_of(lambda: refuse_code(tmp_path))


def test_templates_only_have_places(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    for text in ("{text.__class__}", "{text[0]}", "{text!r}", "{text:{text.__class__}}", "{0}", "{}", "{{ 7 * 7 }}{x}"):
        file.write_text(f"[prompt]\n{text}\n")
        one_line_of(lambda: Template.read(file, {"prompt": frozenset({"text"})}))


READERS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "from_config": ("trust_remote_code", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoModelForCausalLM.from_pretrained": ("trust_remote_code", False),
}
"""Calls that run code from a file unless an argument forbids it."""

NEVER = (
    "pickle.load",
    "pickle.loads",
    "marshal.load",
    "marshal.loads",
    "eval",
    "exec",
    "yaml.load",
    "FileSystemReader",
)
"""Calls that run code from a file, or could."""

MACHINE_CODE = "modules/loop_cache.py"
"""Reads compiled loops from where numba keeps them, beside Python's own compiled files. They are machine code, so
whoever may write there can change the program in any format."""


_SUSPECT = re.compile(r"\b(load|loads|eval|exec|from_pretrained|from_config|FileSystemReader)\(")
"""Files without any such call are not parsed, which would take seconds."""


def calls() -> Iterator[tuple[str, str, dict[str | None, object]]]:
    """Each call in the product: where it is, what is called, and its keyword arguments that are constants."""
    for package in ("modules", "trainer", "launch", "benchmarks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            text = file.read_text()
            for node in ast.walk(ast.parse(text)) if _SUSPECT.search(text) else ():
                if isinstance(node, ast.Call):
                    constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), constants


def test_every_reader_forbids_code() -> None:
    found = 0
    for place, called, constants in calls():
        if not place.startswith(f"{MACHINE_CODE}:"):
            assert called not in NEVER, f"{place}: {called} can run code from a file"
        for reader, (argument, value) in READERS.items():
            if called == reader or called.endswith(f".{reader}"):
                found += 1
                assert constants.get(argument) is value, f"{place}: {called} needs {argument}={value}"
    assert found >= len(READERS)


Attack = Callable[..., None]
"""``attack({file: payload}, *command, reads=False)``: run a command on stored runs with payloads in place of files."""

EXPORTED = ("score", "export", "candidates.parquet", "out.parquet")
SCORED = ("score", "batch", "candidates.parquet", "out.parquet")
CHECKPOINT = "batch/checkpoints/step-00000007"


@pytest.fixture
def attack(tmp_path: Path, marker: Path, nursery: Nursery) -> Attack:
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")

    def run(files: dict[str, bytes], *arguments: str, reads: bool = False) -> None:
        before = {name: (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None for name in files}
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        ended = nursery.run("launch.cli.main", arguments, directory=tmp_path)
        assert not marker.exists(), f"{arguments} ran code of {', '.join(files)}"
        assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
        errors = [line for line in ended.stderr.splitlines() if line.startswith("limelight: error: ")]
        if not reads:
            assert ended.status != 0 and len(errors) <= 1, f"{arguments} accepted {', '.join(files)}"
        for name, content in before.items():
            if content is None:
                (tmp_path / name).unlink()
            else:
                (tmp_path / name).write_bytes(content)

    return run


def in_checkpoint(directory: Path, name: str, payload: bytes) -> dict[str, bytes]:
    """A payload in a checkpoint, and a manifest that agrees with it: whoever writes the one writes the other."""
    manifest = read_manifest(directory / CHECKPOINT)
    copy = directory / "copy" / Path(CHECKPOINT).name
    copy.mkdir(parents=True, exist_ok=True)
    (copy / "payload").write_bytes(payload)
    files = {**manifest.files, name: file_entry(copy / "payload")}
    write_manifest(copy, manifest.model_copy(update={"files": files}))
    return {f"{CHECKPOINT}/{name}": payload, f"{CHECKPOINT}/manifest.json": (copy / "manifest.json").read_bytes()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "evaluate batch",
        " ".join(SCORED),
        "explain batch --user 1 --candidate 1 --at 2024-03-12T20:00",
        "train batch.toml",
        "export batch out",
        "checkpoint show batch",
        "checkpoint diff batch stream",
        "checkpoint verify batch",
    ],
)
def test_no_command_runs_the_index_of_a_checkpoint(tmp_path: Path, marker: Path, attack: Attack, command: str) -> None:
    attack(in_checkpoint(tmp_path, "model/.metadata", pickle.dumps(Payload(marker))), *command.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank-00000.pt", "model/__0_0.distcp"])
def test_no_command_runs_the_tensors_of_a_checkpoint(tmp_path: Path, marker: Path, attack: Attack, name: str) -> None:
    crafted = in_checkpoint(tmp_path, name, pickled_tensor_file(marker))
    attack(crafted, "train", "batch.toml")
    # Scoring reads the state of a rank only for histories that are searched.
    attack(crafted, *SCORED, reads=name == "rank-00000.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features.json", "vocabularies.npz", "authors.npz"])
def test_no_command_runs_the_features(marker: Path, attack: Attack, name: str) -> None:
    arrays = io.BytesIO()
    np.savez(arrays, user=np.array([Payload(marker)], object))
    attack({f"batch/features/{name}": arrays.getvalue()}, *SCORED)
    attack({f"export/features/{name}": arrays.getvalue()}, *EXPORTED)


@pytest.mark.slow
def test_no_command_runs_an_export_a_staytime_run_or_a_table(marker: Path, attack: Attack) -> None:
    payload = pickle.dumps(Payload(marker))
    for name in ("model.safetensors", "export.json", "config.json"):
        attack({f"export/{name}": payload}, *EXPORTED)
    for name in ("model.safetensors", "fitted.json", "config.json"):
        attack({f"staytime/{name}": payload}, "score", "staytime", "out.parquet")
    attack({"candidates.parquet": payload}, *EXPORTED)


@pytest.mark.slow
def test_no_command_runs_the_code_of_a_model(tmp_path: Path, marker: Path, attack: Attack) -> None:
    config = json.loads((tmp_path / "finetune/base/config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.C"}}
    code = f"import os\nos.mkdir({str(marker)!r})\n".encode()
    job = '[run]\ndirectory = "other"\n[data]\ntrain = ["samples/train.jsonl"]\n[model]\npath = "finetune/base"\n'
    (tmp_path / "finetune.toml").write_text(job)
    model = {"finetune/base/config.json": json.dumps(config).encode(), "finetune/base/evil.py": code}
    attack(model, "finetune", "finetune.toml")


def pickled_array(marker: Path) -> bytes:
    """Return a ``.npy`` file whose one element is a payload."""
    content = io.BytesIO()
    np.save(content, np.array([Payload(marker)], object))
    return content.getvalue()


def test_an_adapter_is_no_code(tmp_path: Path, marker: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    payload = pickled_tensor_file(marker)
    (adapter / "adapter_model.bin").write_bytes(payload)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "adapter_model.safetensors is missing" in one_line_of(lambda: check_adapter(base, adapter))
    (adapter / "adapter_model.safetensors").write_bytes(payload)
    one_line_of(lambda: check_adapter(base, adapter))
    for changes in ({"auto_map": {"a": "evil.A"}}, {"peft_type": "XLORA"}, {"megatron_config": {"a": 1}}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        one_line_of(lambda: check_adapter(base, adapter))


@pytest.mark.slow
def test_no_command_runs_an_array_of_a_dataset(tmp_path: Path, marker: Path, attack: Attack) -> None:
    payload = pickled_array(marker)
    arrays = sorted((tmp_path / "world/history").glob("*.npy"))
    assert arrays
    for file in arrays:
        attack({f"world/history/{file.name}": payload}, "data", "describe", "world", reads=True)
    attack({f"world/history/{file.name}": payload for file in arrays}, "train", "batch.toml")


@pytest.mark.slow
def test_no_command_runs_what_embed_reads(tmp_path: Path, marker: Path, attack: Attack) -> None:
    job = (
        '[data]\npath = "world"\nkinds = ["items"]\n[model]\npath = "finetune/base"\nadapter = ""\n'
        f'[embed]\ndirectory = "tables"\ntemplate = "{ROOT}/configs/templates/embed.txt"\n'
    )
    (tmp_path / "embed.toml").write_text(job)
    payload, command = pickle.dumps(Payload(marker)), ("embed", "embed.toml")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        attack({f"finetune/base/{name}": payload}, *command)
    attack({"world/texts/items.parquet": payload}, *command)
    # A template of a chat is never rendered, and weights that are a pickle are never opened.
    jinja = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    others = {"finetune/base/chat_template.jinja": jinja.encode(), "finetune/base/pytorch_model.bin": payload}
    attack(others, *command, reads=True)
    table = tmp_path / "tables/items"
    assert (table / "manifest.json").is_file(), "the work was done"
    for file in sorted(table.iterdir()):
        changed = {f"tables/items/{file.name}": pickled_array(marker) if file.suffix == ".npy" else payload}
        attack(changed, *command, reads=True)
