"""Speed, memory and error of every op; see ``bench/__main__.py``."""

import os

# The profiler, which measures memory, says on stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
