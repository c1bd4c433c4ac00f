"""The `limelight` command, the set-up of its environment, and the start of a job's ranks on this machine."""

import sys

# Here, because every entry point imports this file before any line that an older Python cannot parse.
if sys.version_info < (3, 11):  # noqa: UP036
    message = "limelight: error: {0} is Python {1[0]}.{1[1]}, Limelight needs 3.11 or newer: make PYTHON=python3.11\n"
    sys.stderr.write(message.format(sys.executable, sys.version_info))
    sys.exit(2)
