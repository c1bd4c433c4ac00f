"""The entry point of the command."""

from __future__ import annotations

import importlib.abc
import sys
import tomllib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from launch.cli import start
from tests.paths import ROOT
from trainer.console.exit_status import INTERRUPTED_STATUS


class Interrupt(importlib.abc.MetaPathFinder):
    """Stands for ctrl-C in the middle of an import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "launch.cli.main":
            raise KeyboardInterrupt
        return None


def test_ctrl_c_while_the_command_line_is_imported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "launch.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    assert start.main() == INTERRUPTED_STATUS
    assert capfd.readouterr() == ("", "")


def test_the_command_is_installed_with_this_entry_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("limelight", scripts["limelight"], "console_scripts").load() is start.main
    monkeypatch.setattr(sys, "argv", ["limelight", "trian"])
    assert start.main() == 2
    assert "did you mean train?" in capsys.readouterr().err
