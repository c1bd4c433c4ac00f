"""Figures of accelerators: the packaged file, a user's file, and what is wrong with a described cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.console.errors import UserError
from trainer.planning.accelerators import GPU_FILE, describe_cluster, peers_of, read_accelerators

OWN = """[mine]
memory_gb = 10
memory_gb_per_s = 100
fp32_tflops = 1
bf16_tflops = 2
nvlink_gb_per_s = 10
network_gb_per_s = 1
host_memory_gb = 20
host_link_gb_per_s = 5
"""


def test_every_packaged_accelerator_has_a_source() -> None:
    known, text = read_accelerators(), GPU_FILE.read_text()
    assert {"h200", "h100", "a100-80", "l40s", "cpu"} <= set(known)
    for name in known:
        before = text.partition(f"[{name}]")[0].rpartition("\n\n")[2]
        assert before.startswith("# ") and ("data sheet" in before or "benchmarks/results" in before), name
    assert known["h200"].memory_bytes == 141 * 10**9 and known["cpu"].device == "cpu"


def test_a_file_of_the_user_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(OWN + OWN.replace("mine", "h200"))
    known = read_accelerators(path)
    assert known["mine"] == known["h200"] and known["mine"].device == "cuda"
    assert describe_cluster("mine", 4, 2, path).accelerator.flops_per_s(bf16=True) == 2e12


@pytest.mark.parametrize(
    ("name", "gpus", "hosts", "message"),
    [
        ("h20", 8, 1, r"^--gpu h20: did you mean h200\? known are h200, h100, a100-80, l40s, cpu; --gpu-file adds"),
        ("z", 8, 1, r"^--gpu z: known are h200, h100"),
        ("h200", 64, 6, r"^--gpus 64 cannot be divided equally among --hosts 6; use a multiple of 6$"),
        ("h200", 4, 8, r"^--gpus 4 cannot be divided equally among --hosts 8; use a multiple of 8$"),
    ],
)
def test_a_wrong_cluster_is_one_line(name: str, gpus: int, hosts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_cluster(name, gpus, hosts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("memory_gb = 10", "memory = 10"), r"gpus.toml: \[mine\]: "),
        (OWN.replace("= 100", "= 0"), r"\[mine\]: memory_gb_per_s = 0: input should be greater than 0"),
        ("mine = 3", r"gpus.toml: mine = 3: an accelerator is a section, such as \[mine\]"),
        ("[mine", "gpus.toml: not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gpus.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_accelerators(tmp_path / "gpus.toml")
    with pytest.raises(UserError, match=r"none\.toml: no such file of GPUs"):
        read_accelerators(tmp_path / "none.toml")


@pytest.mark.parametrize(("gpus", "hosts", "near"), [(1, 1, 0.0), (8, 1, 1.0), (64, 8, 7 / 63), (8, 8, 0.0)])
def test_the_other_ranks_are_near_or_far(gpus: int, hosts: int, near: float) -> None:
    peers = peers_of(describe_cluster("h200", gpus, hosts))
    assert peers.near == pytest.approx(near) and peers.near + peers.far == pytest.approx(min(gpus - 1, 1))
