"""Puts the processes that train into numeric mode, if the environment says so; Python imports this file when it starts.

They are those that torch.multiprocessing spawns and the parts of benchmarks/gpu.py.
"""

from __future__ import annotations

import os
import sys

_trains = "multiprocessing.spawn" in " ".join(sys.orig_argv) or "--child" in sys.orig_argv
if os.environ.get("REHEARSAL_MODE") == "numeric" and _trains:
    from gpu_rehearsal.ranks import begin

    begin()
