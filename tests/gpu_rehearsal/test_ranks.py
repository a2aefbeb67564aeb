"""Eight GPUs on this machine, simulated: NCCL's collectives inside the captured step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_rehearsal import checks
from gpu_rehearsal.runtime import Rehearsal


@pytest.mark.timeout(300)  # eight processes import torch on as many cores as there are
def test_eight_gpus_compute_what_one_process_computes(rehearsal: Rehearsal, tmp_path: Path) -> None:
    found = rehearsal.run("eight_ranks", n_gpus=8, mode="numeric", folder=str(tmp_path))
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(8)]
    assert (found["world_size"], found["backend"], found["tricks"]) == (8, "nccl", "confidence")
    checks.is_captured(found | {"violations": [what for report in reports for what in report["violations"]]})
    checks.has_the_cpus_weights(found)
    checks.has_the_cpus_training_figures(found)
    # Each rank has its eighth of every batch, and together they have the images of one process.
    images = [report.pop("seen") for report in reports]
    assert len(found["seen"]) == 2
    for step, expected in enumerate(found["seen"]):
        together = [image for rank in images for image in rank[step]]
        assert together == pytest.approx(expected, rel=1e-12)
    # All ranks launch the same, or one of them would wait for ever.
    assert reports == [reports[0]] * 8
    assert reports[0]["captured collectives"] == 1 and reports[0]["graph launches"] > 2
