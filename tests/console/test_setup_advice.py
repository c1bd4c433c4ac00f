"""Messages advise make only in a checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.doctor import packages
from trainer.console import setup_advice
from trainer.console.setup_advice import extra_command, setup_command

ROOT = Path(__file__).parents[2]


def test_a_checkout_advises_make() -> None:
    assert setup_command() == "make setup"
    assert setup_command("DEVICE=cuda") == "make setup DEVICE=cuda"
    assert setup_command(clean=True) == "make clean setup"
    assert extra_command("confluent-kafka", "kafka") == "make setup EXTRAS=llm,dev,kafka"


def test_a_wheel_advises_what_can_be_typed_without_a_makefile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_advice, "ROOT", tmp_path)
    requirements = ["torch==2.13.0", 'confluent-kafka==2.16.1; extra == "kafka"']
    monkeypatch.setattr(setup_advice, "requires", lambda name: requirements)
    assert extra_command("confluent-kafka", "kafka") == "pip install confluent-kafka==2.16.1"
    assert extra_command("unknown", "kafka") == "pip install unknown"
    told = "in a checkout of Limelight, then install the wheel there again"
    assert setup_command("DEVICE=cpu") == f"make setup DEVICE=cpu {told}"
    checks = (
        packages.check_pins({}, {"numpy": "2.4.6"}),
        packages.check_triple({}),
        packages.check_accelerator("13.0", [], True, False),
    )
    assert all(told in check.fix for check in checks)


def test_only_this_helper_and_the_setup_itself_spell_the_command() -> None:
    spelled = {
        str(file.relative_to(ROOT))
        for package in ("trainer", "launch", "modules")
        for file in (ROOT / package).rglob("*.py")
        if re.search(r"(?<!`)\bmake (clean )?setup", file.read_text())
    }
    assert spelled <= {"trainer/console/setup_advice.py", "launch/setup.py"}
