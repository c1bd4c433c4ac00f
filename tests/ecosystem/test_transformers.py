"""Test of plain transformers: a merged model loads and generates in a process that cannot import Limelight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.llm.tiny import adapted, write_base
from trainer.llm.models.adapter import save_adapter, write_merged

PROMPT = "river fire ? "

SCRIPT = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("trainer", "modules", "launch", "benchmarks"):
            raise ModuleNotFoundError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
try:
    import trainer
    raise SystemExit("trainer can be imported")
except ModuleNotFoundError:
    pass
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
made = model.generate(**ids, max_new_tokens=8, do_sample=False)
print(json.dumps({"ids": made[0].tolist(), "text": tokenizer.decode(made[0])}))
"""


def test_a_merged_model_generates_without_limelight(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model = adapted(base)
    values = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    save_adapter(model, values, tmp_path / "adapter", {"base": base.fingerprint})
    write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    ids = torch.tensor([base.tokenizer(PROMPT)["input_ids"]])
    expected = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist()

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "merged"), PROMPT],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout.splitlines()[-1])
    assert made["ids"] == expected and len(expected) > ids.shape[1]
    assert made["text"].startswith(PROMPT.strip())
