"""The templates for clusters: well-formed, and their commands are ones that torchrun, deepspeed and the job take."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.forked import ForkedJob
from tests.paths import ROOT
from trainer.config.ranker import JobConfig, load_config
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments

CLUSTER = ROOT / "launch" / "cluster"
TIMEOUTS = 600.0


def job_of(arguments: list[str]) -> JobConfig:
    """The job that a template starts, as ``trainer.rank`` understands it."""
    given = parse_rank_arguments("trainer.rank", "", TRAIN_ARGUMENTS, arguments)
    return load_config(ROOT / given.config, given.overrides)


def parse_torchrun(arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the arguments that torchrun takes from its command line and from ``PET_*`` in the environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = get_args_parser().parse_args(arguments)
    assert given.module and given.training_script == "trainer.rank"
    return given


SLURM = {
    "srun": 'exec "$@"',
    "scontrol": """
case "$*" in
    "show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
    *) echo "$*" >> "$HERE/scontrol" ;;
esac""",
}
TORCHRUN = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(os.environ["HERE"])
def save(number, frame):
    time.sleep(0.3)
    (here / "saved").touch()
    sys.exit(int(os.environ["STATUS"]))
signal.signal(signal.SIGTERM, save)
(here / "safe_path").write_text(os.environ.get("PYTHONSAFEPATH", ""))
(here / "started.part").write_text(json.dumps(sys.argv[1:]))
(here / "started.part").rename(here / "started")
if os.environ["ENDS"] == "by itself": sys.exit(int(os.environ["STATUS"]))
time.sleep(60)
"""


def run_batch(directory: Path, *arguments: str, ends: str, status: int) -> int:
    """Run the batch script with stand-ins for Slurm and torchrun, as Slurm would on the first node; its status.

    Args:
        directory: from which the job was submitted.
        arguments: of the script.
        ends: "by itself", or "asked": the script gets SIGTERM, as before the time limit.
        status: with which torchrun ends.
    """
    commands = directory / "bin"
    commands.mkdir()
    for name, body in {**SLURM, "torchrun": f'exec {sys.executable} {directory / "torchrun.py"} "$@"'}.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    (directory / "torchrun.py").write_text(TORCHRUN)
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "activate").write_text(f'PATH="{commands}:$PATH"\n')
    script = subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sbatch"), *arguments],
        env={
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HERE": str(directory),
            "ENDS": ends,
            "STATUS": str(status),
            "SLURM_SUBMIT_DIR": str(directory),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        },
    )
    if ends == "asked":
        deadline = time.monotonic() + TIMEOUTS
        while not (directory / "started").exists():
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.02)
        script.send_signal(signal.SIGTERM)
    return script.wait(timeout=TIMEOUTS)


@pytest.mark.parametrize(
    ("ends", "status", "requeued"),
    [("by itself", 0, False), ("by itself", 1, False), ("asked", 1, True), ("asked", 0, False)],
)
def test_a_slurm_job_that_is_asked_to_end_saves_and_goes_back_into_the_queue(
    ends: str, status: int, requeued: bool, tmp_path: Path
) -> None:
    assert run_batch(tmp_path, "configs/kuairand.toml", ends=ends, status=status) == status
    assert (tmp_path / "saved").exists() == (ends == "asked"), "the script waits for the ranks"
    told = tmp_path / "scontrol"
    assert (told.read_text() if told.exists() else "") == ("requeue 4711\n" if requeued else "")


def test_the_slurm_command_is_one_that_torchrun_and_the_job_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch(tmp_path, "configs/kuairand.toml", "train.epochs=2", ends="by itself", status=0)
    assert (tmp_path / "safe_path").read_text() == "1", "a rank imports nothing from the working directory"
    given = parse_torchrun(json.loads((tmp_path / "started").read_text()), {}, monkeypatch)
    assert (given.nnodes, given.nproc_per_node, given.rdzv_backend) == ("2", "4", "c10d")
    assert given.rdzv_endpoint == "node1:24711" and given.rdzv_id == "4711"
    config = job_of(given.training_script_args)
    assert config.run.directory == "runs/slurm-4711" and config.train.epochs == 2
    warned = re.search(r"--signal=B:TERM@(\d+)", (CLUSTER / "slurm.sbatch").read_text())
    assert warned and given.shutdown_timeout < int(warned[1]), "the ranks have ended before the job is"


def test_the_slurm_script_is_sound() -> None:
    script = str(CLUSTER / "slurm.sbatch")
    subprocess.run(["bash", "-n", script], check=True, timeout=TIMEOUTS)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", script], check=True, timeout=TIMEOUTS)
    lines = Path(script).read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    known = ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "signal")
    assert {option[2:].partition("=")[0] for option in options} <= {*known, "output", "open-mode"}
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": {"limits": dict},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly?": bool}],
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim?": {"claimName": str},
    "emptyDir?": {"medium": ("Memory",), "sizeLimit": str},
}
PYTORCH_JOB = {
    "apiVersion": ("kubeflow.org/v1",),
    "kind": ("PyTorchJob",),
    "metadata": {"name": str},
    "spec": {
        "elasticPolicy": {"rdzvBackend": ("c10d",), "minReplicas": int, "maxReplicas": int, "maxRestarts": int},
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": ("All", "Running", "None")},
        "pytorchReplicaSpecs": {
            "Worker": {
                "replicas": int,
                "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
                "template": {
                    "spec": {
                        "terminationGracePeriodSeconds": int,
                        "containers": [CONTAINER],
                        "volumes": [VOLUME],
                    }
                },
            }
        },
    },
}
"""The part of PyTorchJob v1 of Kubeflow's training operator, and of a pod, that the template may use. A type, a tuple
of values, a list of one form, or keys and their forms; those that end in ? may be missing."""


def misfits(value: object, form: Any, path: str = "") -> list[str]:
    """Return the places where a document differs from its form."""
    if isinstance(form, tuple):
        return [] if value in form else [f"{path}: {value!r} is none of {form}"]
    if isinstance(form, type):
        return [] if type(value) is form else [f"{path}: {value!r} is no {form.__name__}"]
    if isinstance(form, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: no list"]
        return [found for number, item in enumerate(value) for found in misfits(item, form[0], f"{path}[{number}]")]
    if not isinstance(value, dict):
        return [f"{path}: no mapping"]
    forms = {key.rstrip("?"): inner for key, inner in form.items()}
    found = [f"{path}.{key}: not a field" for key in value if key not in forms]
    found += [f"{path}.{key}: missing" for key in form if not key.endswith("?") and key not in value]
    return found + [item for key in value if key in forms for item in misfits(value[key], forms[key], f"{path}.{key}")]


def test_the_kubernetes_job_has_the_fields_of_a_pytorch_job() -> None:
    document = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    assert misfits(document, PYTORCH_JOB) == []
    worker = document["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    elastic = document["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    # The operator gives its environment to the container of this name.
    assert [container["name"] for container in pod["containers"]] == ["pytorch"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_misfits_are_found() -> None:
    """The check itself can fail."""
    document = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    document["spec"]["elasticPolicy"] |= {"minReplica": 1, "maxReplicas": "4"}
    del document["metadata"]["name"]
    document["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] = "Sometimes"
    assert len(misfits(document, PYTORCH_JOB)) == 4


def test_the_kubernetes_command_is_one_that_torchrun_and_the_job_take(monkeypatch: pytest.MonkeyPatch) -> None:
    document = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    pod = document["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == [f"{container['workingDir']}/.venv/bin/torchrun"]
    assert {"name": "PYTHONSAFEPATH", "value": "1"} in container["env"]
    # As the operator sets them from elasticPolicy.
    environment = {"PET_NNODES": "1:4", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "limelight-worker-0:23456"}
    given = parse_torchrun(container["args"], environment, monkeypatch)
    assert (given.nnodes, given.rdzv_endpoint) == ("1:4", "limelight-worker-0:23456")
    assert given.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    config = job_of(given.training_script_args)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert Path(config.data.path).parts[:2] == ("/", "data") and "/data" in mounts
    assert Path(config.run.directory).parts[:2] == ("/", "runs") and not mounts["/runs"].get("readOnly")


def test_the_hostfile_and_its_commands_are_ones_that_deepspeed_and_the_job_take() -> None:
    text = (CLUSTER / "hostfile").read_text()
    commands = [
        shlex.split(found.replace("\\\n#", " "))[1:] for found in re.findall(r"#   (deepspeed(?:.*\\\n)*.*)", text)
    ]
    assert len(commands) == 2
    numbered = [["0" if word == "i" else word for word in command] for command in commands]

    def read() -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.launcher.runner import fetch_hostfile, parse_args

        given = [vars(parse_args(command)) for command in numbered]
        print(json.dumps([fetch_hostfile(str(CLUSTER / "hostfile")), given]))

    # In a process of its own: DeepSpeed looks for an accelerator when it is imported.
    job = ForkedJob(read)
    *_, printed = job.stdout
    assert job.wait() == 0
    job.close()
    hosts, read_commands = json.loads(printed)
    assert hosts == {"worker-0": 8, "worker-1": 8}
    for given in map(lambda found: argparse.Namespace(**found), read_commands):
        assert given.module and given.user_script == "trainer.rank" and (ROOT / given.hostfile).exists()
        job_of(["--local_rank=0", *given.user_args])
    assert read_commands[1]["no_ssh"] and read_commands[1]["master_addr"] == next(iter(hosts))
