"""Tests of ``limelight --version``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from launch.cli import version as version_module
from launch.cli.main import main


def test_versions_are_those_of_the_installed_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(" ", 1) for line in lines)
    for name in ("torch", "torchrec", "deepspeed", "transformers"):
        assert found[name] == version(name)
    assert lines[0].startswith("limelight ") and lines[-1].startswith("python 3.")
    assert len([name for name in found if name.startswith("fbgemm-gpu")]) == 1


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(version_module, "version", none)
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "limelight of a checkout that is not installed"
    assert "fbgemm-gpu is not installed" in lines and "transformers is not installed" in lines
    assert "fbgemm-gpu-cpu is not installed" not in lines
