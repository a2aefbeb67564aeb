"""Puts the processes that torch.multiprocessing spawns into numeric mode; Python imports this file when it starts."""

from __future__ import annotations

import os
import sys

if os.environ.get("REHEARSAL_MODE") == "numeric" and "multiprocessing.spawn" in " ".join(sys.orig_argv):
    from gpu_rehearsal.ranks import begin

    begin()
