"""``limelight configs``: copy Limelight's own job files and templates."""

from __future__ import annotations

import click

from launch.cli.command import Command
from trainer.console.outputs import LocalOutputPath


@click.command(
    cls=Command,
    short_help="Copy the job files and templates to a directory.",
    help="""Copy Limelight's own job files, DeepSpeed settings, prompt templates, and templates for clusters.

\b
DIR/*.toml        job files
DIR/deepspeed/    DeepSpeed settings
DIR/templates/    prompt templates
DIR/cluster/      a hostfile, a batch script for Slurm, a job for Kubernetes

Paths in the copies name the copies, as seen from the working directory of now. Files that exist and differ are kept,
and nothing is written, unless --overwrite is given.""",
    example="limelight configs configs",
)
@click.argument(
    "directory", metavar="DIR", type=LocalOutputPath(), help="Directory to write; it is made if it is missing."
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist with another content.")
def configs(directory: str, overwrite: bool) -> None:
    """Copy the files and print where the job files are."""
    from launch.own_files import copy_own_files

    written = copy_own_files(directory, overwrite=overwrite)
    print(f"{directory}: {len(written)} files written")
