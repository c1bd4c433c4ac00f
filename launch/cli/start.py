"""Entry point of the ``limelight`` command: catches ctrl-C also while the command line is imported."""

from __future__ import annotations


def main() -> int:
    """Run the command line of this process and return its exit status."""
    try:
        from launch.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        # The status of trainer/console/exit_status.py, which may not be imported yet.
        return 130
