"""N processes compute what one does, mistakes show before any process starts, and nothing hangs its caller."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset, read_decoded, write_decoded
from cifar_fast.distributed import launch as launching
from cifar_fast.distributed.launch import Trainer, check_fit, choose_world_size, launch
from cifar_fast.distributed.ranks import choose_backend, rank_device
from cifar_fast.errors import RecipeError, RunError, TrainingError, UserError
from cifar_fast.training.loop import train
from cifar_fast.training.result import EpochResult, RunResult, load_run

pytestmark = pytest.mark.timeout(600)  # for hangs: on a busy machine a start may take a minute

# Apple's recipe with a narrow network and small batches: 10 steps an epoch on 640 images, two epochs.
APPLE = replace(
    recipes.apple_8gpu(),
    widths=(4, 4, 8, 8),
    ghost_batch_size=4,
    global_batch_size=64,
    epochs=2.0,
    flat_epochs=0.2,
    precision="float64",
    compile="off",  # on a GPU every process would compile in float64, which takes minutes
)
MUON = replace(
    recipes.smoke(), widths=(4, 8, 8), n_shards=2, global_batch_size=64, precision="float64", ema_decay=0.9, ema_every=2
)
QUICK = replace(MUON, precision="float32", epochs=1.0)
COMMAND = [sys.executable, "-m", "cifar_fast"]


def weights(result: RunResult) -> dict[str, Tensor]:
    """Return weights and running statistics on the CPU, without the batches that each rank counts for itself."""
    state = result.model.state_dict()
    return {name: value.cpu() for name, value in state.items() if not name.endswith("num_batches_tracked")}


def assert_same(a: RunResult, b: RunResult) -> None:
    for mine, other in zip(a.epochs, b.epochs, strict=True):
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert getattr(mine, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-9), name
    assert weights(a).keys() == weights(b).keys()
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def alone(tiny_data: Dataset) -> RunResult:
    """Twenty steps of `APPLE` in one process."""
    return train(APPLE, tiny_data, device="cpu", progress=False, save_logits=True)


@pytest.fixture(scope="module")
def shared(tiny_data: Dataset) -> Iterator[Callable[[], Trainer]]:
    """A function that returns a trainer of two processes for many tests, a new one if an earlier test has lost them.

    Its data are a subset, though one of all images, so that the indices have to reach the processes.
    """
    started: list[Trainer] = []
    everything = tiny_data.subset(range(len(tiny_data.train_labels)))

    def get() -> Trainer:
        if not started or not started[-1].pids:
            started.append(Trainer(everything, world_size=2, device="cpu", timeout=60.0))
        return started[-1]

    yield get
    for trainer in started:
        trainer.close()


@pytest.fixture
def pair(shared) -> Trainer:
    return shared()


def test_two_processes_compute_the_same_as_one(pair, alone, tmp_path):
    result = pair.train(APPLE, progress=False, save_logits=True, out=tmp_path / "run")
    assert_same(result, alone)
    read = load_run(tmp_path / "run")  # rank 0 has written it
    for run in (result, read):  # each rank has seen every other test image
        torch.testing.assert_close(run.logits, alone.logits, rtol=0, atol=1e-3)  # one in the last digit of float16
        assert torch.equal(run.test_labels, alone.test_labels)
        assert torch.equal(run.train_indices, torch.arange(640))
        assert run.dataset == pair.data.describe() != alone.dataset
    assert next(iter(weights(result).values())).dtype == torch.float64
    assert (result.environment["world_size"], result.environment["backend"]) == (2, "gloo")


@pytest.mark.parametrize("world_size", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_processes_computes_the_same(alone, tiny_data, world_size):
    result = launch(APPLE, tiny_data, world_size=world_size, device="cpu", timeout=60.0, progress=False)
    assert_same(result, alone)
    assert result.environment["world_size"] == world_size
    assert result.environment["backend"] == ("gloo" if world_size > 1 else None)


def test_another_seed_computes_something_else(alone, tiny_data):
    other = train(APPLE, tiny_data, device="cpu", progress=False, seed=1)
    with pytest.raises(AssertionError):
        assert_same(other, alone)


def test_muon_ema_and_batch_norm_of_a_whole_shard_compute_the_same(pair, tiny_data):
    assert_same(pair.train(MUON, progress=False), train(MUON, tiny_data, device="cpu", progress=False))


def test_a_trainer_trains_again_and_again(pair, tiny_data, tmp_path):
    pids = pair.pids
    pair.warm_up(QUICK)
    epochs: list[EpochResult] = []
    first = pair.train(QUICK, seed=0, progress=False, on_epoch=epochs.append, out=tmp_path / "run")
    second = pair.train(QUICK, seed=1, progress=False)
    again = pair.train(QUICK, seed=0, progress=False)
    assert pair.pids == pids
    assert epochs == first.epochs
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    assert any(not torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    read = load_run(tmp_path / "run")  # rank 0 has written it
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(read).items())
    assert (tmp_path / "run" / "timing_log.tsv").read_text().count("\n") == 2
    with pytest.raises(RunError, match="exists already"):
        pair.train(QUICK, out=tmp_path / "run", progress=False)


def test_a_recipe_that_does_not_fit_leaves_the_processes_alone(pair):
    with pytest.raises(RecipeError, match="n_shards=3 cannot be divided among world_size=2"):
        pair.train(replace(QUICK, n_shards=3, global_batch_size=66))
    assert pair.train(QUICK, progress=False).epochs


def test_progress_arrives_in_the_caller(pair, capfd):
    pair.train(QUICK, progress=True)
    err = capfd.readouterr().err
    first, *_, last = err.splitlines()
    assert first == "smoke on synthetic, 2 processes: 0%, epoch 1 of 1, accuracy follows after epoch 1"
    assert re.fullmatch(r"smoke on synthetic, 2 processes: 100%, epoch 1 of 1, 0:0\d left, test accuracy .*%", last)


def test_a_divergence_is_the_same_error_as_in_one_process(pair, tmp_path):
    diverging = replace(QUICK, optimizer="sgd", peak_lr=1e30)
    with pytest.raises(TrainingError, match="diverged; lower peak_lr"):
        pair.train(diverging, progress=False, out=tmp_path / "run")
    assert (tmp_path / "run" / "recipe.json").exists()
    assert pair.pids == []


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="this system does not say what is mapped")
def test_data_from_a_decoded_file_is_mapped_not_copied(tiny_data, tmp_path):
    write_decoded(tiny_data, tmp_path / "data.safetensors")
    data = read_decoded(tmp_path / "data.safetensors")
    with Trainer(data, world_size=2, device="cpu", timeout=60.0) as trainer:
        maps = [file.path for pid in trainer.pids for file in psutil.Process(pid).memory_maps()]
    assert maps.count(str(tmp_path / "data.safetensors")) == 2


def test_processes_get_a_part_of_the_data_not_the_file_of_all(tiny_data, tmp_path):
    write_decoded(tiny_data, tmp_path / "data.safetensors")
    data = read_decoded(tmp_path / "data.safetensors")
    assert data.decoded is not None
    assert replace(data, train_images=data.train_images[:128]).decoded is None, "a trainer writes it to a new file"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError("no space left"), UserError, "cannot be written to .*: no space left; set TMPDIR to a folder"),
    ],
)
def test_an_interrupt_or_a_full_disk_while_the_data_are_written_ends_the_processes(
    tiny_data, monkeypatch, tmp_path, error, expected, message
):
    ended: list[bool] = []

    class Processes:
        folder = tmp_path

        def __init__(self, *args, **options): ...

        def close(self) -> None:
            ended.append(True)

    def fail(*args):
        raise error

    monkeypatch.setattr(launching, "WatchedProcesses", Processes)
    monkeypatch.setattr(launching, "write_decoded", fail)
    with pytest.raises(expected, match=message):
        launch(QUICK, tiny_data, world_size=2, device="cpu", progress=False)
    assert ended == [True]


# --- mistakes that show before a process starts ---


@pytest.fixture
def nothing_starts(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(launching, "WatchedProcesses", refuse)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 3, "n_shards=2 cannot be divided among world_size=3 processes: use 1 or 2 of them"),
        ({"n_shards": 1}, 2, "use 1 of them, or a recipe with n_shards=2"),
        ({"global_batch_size": 1600}, 2, "a batch of 800 images cannot be drawn from a shard of 320"),
        (
            {"micro_batch_size": 64, "n_shards": 4, "ghost_batch_size": 16},
            4,
            "micro_batch_size=64 does not divide the 16",
        ),
        ({}, 0, "world_size=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_process_starts(tiny_data, nothing_starts, changes, world_size, message):
    with pytest.raises(UserError, match=message):
        launch(replace(QUICK, **changes), tiny_data, world_size=world_size, device="cpu")


def test_nccl_needs_gpus(tiny_data, nothing_starts):
    with pytest.raises(UserError, match="'nccl' connects GPUs, but the device is the CPU; choose gloo"):
        launch(QUICK, tiny_data, world_size=2, device="cpu", backend="nccl")
    with pytest.raises(UserError, match="'mpi' is not known; choose nccl"):
        choose_backend(torch.device("cpu"), "mpi")


def test_more_processes_than_test_images():
    few = Dataset("few", ("a", "b"), *(torch.zeros(8, 3, 32, 32), torch.zeros(8)), *(torch.zeros(1),) * 2, "", "")
    with pytest.raises(RecipeError, match="1 test images cannot be shared by world_size=2"):
        check_fit(replace(QUICK, global_batch_size=4), 2, few)


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_all_gpus_are_used_that_can_share_the_shards(four_gpus, monkeypatch):
    assert choose_world_size(None, None) == 4
    assert choose_world_size(None, "cuda", APPLE) == 4
    assert choose_world_size(None, None, replace(QUICK, n_shards=3, global_batch_size=66)) == 3
    assert choose_world_size(None, None, recipes.airbench_2024()) == 1
    assert choose_world_size(None, None, recipes.speedrun()) == 4
    assert choose_world_size(None, "cuda:1") == 1
    assert choose_world_size(8, "cpu") == 8
    with monkeypatch.context() as patch:
        patch.setattr(launching, "select_device", torch.device)
        assert choose_world_size(None, "mps") == 1
        with pytest.raises(UserError, match="device='mps' is used by one process, not by world_size=2"):
            choose_world_size(2, "mps")
    assert choose_world_size(None, "cpu") == 1
    assert choose_backend(torch.device("cuda", 0)) == ("nccl" if torch.distributed.is_nccl_available() else "gloo")


def test_too_few_gpus_name_the_way_out(four_gpus, tiny_data, nothing_starts):
    with pytest.raises(UserError, match=r"world_size=8 processes need as many GPUs, but .* 4: .*--device cpu.*gloo"):
        launch(APPLE, tiny_data, world_size=8)
    with pytest.raises(UserError, match="'cuda:1' is one GPU"):
        launch(APPLE, tiny_data, world_size=2, device="cuda:1")
    with pytest.raises(UserError, match="process 4 of this machine has no GPU"):
        rank_device(None, 4)


# --- from a terminal, and under torchrun ---


@pytest.fixture
def arguments(pictures: Path, tmp_path: Path) -> list[str]:
    """Return the arguments of a `train` command of two steps in two shards, which writes tmp_path / "run"."""
    words = f"train --recipe smoke --data {pictures} --device cpu --out {tmp_path / 'run'} --n-shards 2 --widths 8 8 8"
    words += " --global-batch-size 60 --precision float32 --convolution direct --epochs 1"
    return f"{words} --timeout 120".split()  # on a busy machine a process may have to wait long for a core


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "CIFAR_FAST_DATA")}
    return kept | {"OMP_NUM_THREADS": "1"} | variables


def test_the_command_line_trains_on_two_processes(arguments, tmp_path):
    command = [*COMMAND, *arguments, "--world-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stdout and "data set" in done.stdout
    assert load_run(tmp_path / "run").environment["world_size"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C as Linux and macOS have it")
def test_ctrl_c_ends_all_and_keeps_the_log(arguments, tmp_path):
    command = [*COMMAND, *arguments, "--world-size", "2", "--epochs", "100000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        while not (line := running.stdout.readline()).startswith("epoch"):
            assert line, running.stderr.read()
        children = psutil.Process(running.pid).children(recursive=True)
        assert len(children) >= 2
        os.killpg(running.pid, signal.SIGINT)
        err = running.stderr.read()
        assert running.wait() == 130
    assert "finished epochs are logged in" in err and "Traceback" not in err, err
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive
    assert (tmp_path / "run" / "timing_log.tsv").read_text().count("\n") >= 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "cifar_fast"]


def test_torchrun_is_joined(arguments, tmp_path):
    command = torchrun("--standalone", "--nproc-per-node", "2")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    result = load_run(tmp_path / "run")
    assert (result.environment["world_size"], result.environment["backend"]) == (2, "gloo")
    assert done.stdout.count("(train_seconds)") == 1, "rank 0 alone prints"


def test_a_rank_of_torchrun_exits_without_shutting_the_interpreter_down(arguments):
    """The process group's threads outlive it and may abort a process whose interpreter shuts down."""
    program = "import atexit; atexit.register(print, 'shut down'); from cifar_fast.cli import main_and_exit"
    command = [sys.executable, "-c", f"{program}; main_and_exit()", *arguments]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**rank))
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "shut down" not in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=environment(**rank))
    assert again.returncode == 2, "the run folder exists"
    assert "error:" in again.stderr


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    """Two network namespaces joined by a virtual cable; where none can be made, this machine twice."""
    names = [f"cifar-fast-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"cf{os.getpid()}n{number}" for number in range(2)]
    addresses = ["10.213.0.1", "10.213.0.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        hosts = [
            Host(["ip", "netns", "exec", name], address, {"GLOO_SOCKET_IFNAME": cable})
            for name, cable, address in zip(names, cables, addresses, strict=True)
        ]
    except (OSError, subprocess.CalledProcessError):
        hosts = [Host([], "127.0.0.1", {})] * 2
    try:
        yield hosts
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@dataclass
class Host:
    """A machine of its own, as far as its network goes."""

    prefix: list[str]
    """Words before a command that runs there."""
    address: str
    variables: dict[str, str]


def test_two_hosts_train_together(two_hosts, arguments, tmp_path):
    agents = []
    address, port = two_hosts[0].address, str(free_port())
    for node, host in enumerate(two_hosts):
        options = ("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node))
        command = [*host.prefix, *torchrun(*options, "--master-addr", address, "--master-port", port), *arguments]
        agents.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**host.variables)))
    errors = [agent.communicate()[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert load_run(tmp_path / "run").environment["world_size"] == 2


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "are set without MASTER_ADDR and MASTER_PORT: start with torchrun"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "must be whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be the number"),
    ],
)
def test_a_half_set_environment_is_explained(monkeypatch, tiny_data, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch(QUICK, tiny_data, device="cpu")


def test_another_world_size_than_torchrun_has_started(monkeypatch, tiny_data):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="world_size=4, but the launcher has started 2"):
        launch(QUICK, tiny_data, world_size=4, device="cpu")


# --- with GPUs ---


@pytest.mark.gpu
def test_processes_on_a_cpu_start_after_cuda_was_used(tiny_data):
    torch.zeros(1, device="cuda").item()
    assert launch(QUICK, tiny_data, world_size=2, device="cpu", progress=False).environment["backend"] == "gloo"


@pytest.mark.gpu
def test_all_gpus_compute_what_one_does(tiny_data):
    world_size = choose_world_size(None, "cuda", APPLE)
    one = train(APPLE, tiny_data, device="cuda:0", progress=False)
    result = launch(APPLE, tiny_data, device="cuda", progress=False)
    assert result.environment["world_size"] == world_size
    assert result.environment["backend"] == ("nccl" if world_size > 1 else None)
    assert_same(result, one)


# --- from a notebook ---


@pytest.fixture
def kernel():
    manager_of = pytest.importorskip("jupyter_client.manager")
    manager, client = manager_of.start_new_kernel(kernel_name="python3", startup_timeout=300)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


CELL = """
import cifar_fast as cf
recipe = cf.replace(cf.recipes.smoke(), widths=(4, 8, 8), n_shards=2, global_batch_size=64, epochs={epochs})
data = cf.synthetic(640, 200)
result = cf.launch(recipe, data, world_size=2, device="cpu", on_epoch=lambda epoch: print("epoch", epoch.epoch))
print("done", result.environment["world_size"])
"""


def test_a_notebook_trains_is_interrupted_and_trains_again(kernel):
    manager, client = kernel
    printed: list[str] = []

    def collect(message) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])
        if interrupting and "epoch 2" in "".join(printed):
            interrupting.clear()
            manager.interrupt_kernel()

    interrupting = [True]
    reply = client.execute_interactive(CELL.format(epochs=10_000), output_hook=collect, timeout=400)["content"]
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    kernel_process = psutil.Process(manager.provisioner.pid)
    end = time.monotonic() + 120
    while (left := started_by(kernel_process)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    printed.clear()
    reply = client.execute_interactive(CELL.format(epochs=1), output_hook=collect, timeout=400)["content"]
    assert reply["status"] == "ok" and "done 2" in "".join(printed)


def started_by(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
