"""How a job gets onto machines: the `limelight` command, the set-up of its environment, the start of its ranks."""

import sys

# Here, because every way in passes here before it meets a line that an older Python cannot parse.
if sys.version_info < (3, 11):  # noqa: UP036
    message = "limelight: error: {0} is Python {1[0]}.{1[1]}, Limelight needs 3.11 or newer: make PYTHON=python3.11\n"
    sys.stderr.write(message.format(sys.executable, sys.version_info))
    sys.exit(2)
