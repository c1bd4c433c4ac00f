"""Shell completion: the line of the documents, in a real bash, and in zsh where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

# Words after which TAB is pressed -> what must and what must not be offered.
CASES = [
    ("", {"train", "finetune", "data", "checkpoint", "config", "completion"}, {"simulate"}),
    ("tr", {"train"}, {"data"}),
    ("checkpoint ", {"show", "verify", "diff"}, {"train"}),
    ("data im", {"import"}, {"simulate"}),
    ("data import kuai", {"kuairand", "kuailive", "kuailive-m3", "kuaicomt"}, {"events"}),
    ("train job.toml --ra", {"--ranks"}, {"--json"}),
    ("stream assemble data out --policy re", {"realtime", "realtime_naive"}, {"full"}),
]


@pytest.fixture
def shell_environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has the command as it is installed."""
    command = tmp_path / "limelight"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.cli.main "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def output_of(shell: str, script: str, environment: dict[str, str]) -> str:
    done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done
    return done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_options_and_values(shell_environment: dict[str, str]) -> None:
    lines = [
        'eval "$(limelight completion bash)"',
        'complete -p limelight | grep -q " -F _limelight_completion " || exit 1',
    ]
    for words, _, _ in CASES:
        typed = ["limelight", *words.split(" ")]
        quoted = " ".join(f"'{word}'" for word in typed)
        lines.append(f"COMP_WORDS=({quoted}); COMP_CWORD={len(typed) - 1}; COMPREPLY=()")
        lines.append('_limelight_completion limelight; echo "${COMPREPLY[@]}"')
    printed = output_of("bash", "\n".join(lines), shell_environment).splitlines()
    for (words, offered, other), line in zip(CASES, printed, strict=True):
        assert offered <= set(line.split()) and not other & set(line.split()), (words, line)


def test_zsh_asks_for_completions_with_their_help(shell_environment: dict[str, str]) -> None:
    script = output_of("sh", "limelight completion zsh", shell_environment)
    assert script.startswith("#compdef limelight") and "_LIMELIGHT_COMPLETE=zsh_complete" in script
    if shutil.which("zsh"):
        output_of("zsh", 'autoload -U compinit && compinit -D; eval "$(limelight completion zsh)"', shell_environment)
    asked = {"_LIMELIGHT_COMPLETE": "zsh_complete", "COMP_WORDS": "limelight checkpoint v", "COMP_CWORD": "2"}
    kind, value, help_text = output_of("sh", "limelight", {**shell_environment, **asked}).splitlines()
    assert (kind, value) == ("plain", "verify") and help_text
