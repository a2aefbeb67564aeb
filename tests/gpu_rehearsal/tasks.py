"""What is done on the fake runtime, each function in a process of its own; see `runtime.Rehearsal`.

Arguments and results are JSON.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from cells import run_cell
from torch import Tensor, nn

import cifar_fast.distributed.launch as launch_module
import cifar_fast.training.capture as capture
import cifar_fast.training.loop as loop
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.synthetic import synthetic
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import named
from cifar_fast.training.alone import ALONE, Alone
from cifar_fast.training.result import RunResult
from gpu_rehearsal import ranks
from gpu_rehearsal.calls import by_kind, calls, n_calls
from gpu_rehearsal.mutants import ANOTHER_RANK, MUTANTS
from gpu_rehearsal.numeric import SimulatedGPU
from gpu_rehearsal.small import small

# ---- Weights ----


def run(recipe: Recipe, data: Dataset, device: str, **arguments: Any) -> RunResult:
    """Train quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loop.train(recipe, data, device=device, progress=False, **arguments)


def differences(result: RunResult, other: RunResult) -> dict[str, float]:
    """Return by how much two runs differ at most, in weights and in the figures of their epochs."""
    pairs = zip(result.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    epochs = list(zip(result.epochs, other.epochs, strict=True))
    figures = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    found = {"weights": max(float((a.cpu().double() - b.cpu().double()).abs().max()) for a, b in pairs)}
    return found | {name: max(abs(getattr(a, name) - getattr(b, name)) for a, b in epochs) for name in figures}


def observe(recipe: Recipe, data: Dataset, cpu: RunResult, **arguments: Any) -> dict[str, Any]:
    """Train on the simulated GPU; return how that differs from the CPU's run, and what each step asked for."""
    before = n_calls()
    with SimulatedGPU() as gpu:
        copies: list[Counter[str]] = []
        marks: list[int] = []

        def on_step(done: int, total: int) -> None:
            marks.append(n_calls())
            copies.append(gpu.copies.copy())

        result = run(recipe, data, "cuda", on_step=on_step, **arguments)
        found = differences(result, cpu) | {key: result.environment[key] for key in ("step_mode", "step_mode_reason")}
    per_epoch = len(marks) // 2
    # The last epoch's steps without its first, before which the epoch's choices are sent.
    begin, end = marks[per_epoch], marks[-1]
    return found | {
        "steps": per_epoch - 1,
        "calls of the steps": by_kind(calls(begin, end)),
        "copies of the steps": copies[-1] - copies[per_epoch],
        "conversions": gpu.conversions,
        "violations": [call.name for call in calls(before) if call.kind == "violation"],
    }


def compare_with_cpu(name: str, resolutions: Sequence[int] = ()) -> dict[str, Any]:
    """Train a small recipe on a CPU, and on a GPU eager and captured; return what `observe` saw of the GPU's runs."""
    data = synthetic(160, 40, seed=0)
    # With images of several sizes the whitening bias is frozen in the middle of those of the first size.
    changes = {"resolutions": tuple(resolutions), "whitening_bias_epochs": 0.5} if resolutions else {}
    cpu = run(small(name, **changes), data, "cpu")
    runs = {mode: observe(small(name, **changes, cuda_graph=mode), data, cpu) for mode in ("off", "on")}
    learned = abs(cpu.epochs[0].train_loss - cpu.epochs[1].train_loss)
    return {"eager": runs["off"], "captured": runs["on"], "learned": learned}


class BesideAnIdleRank(Alone):
    """One of two ranks over NCCL, of which the other has no gradients: their mean is half of one's own."""

    def average_gradients(self, model: nn.Module, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Halve every gradient."""
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(2)

    def average_buffer(self, flat: Tensor, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Halve the buffer."""
        flat.div_(2)


def run_mutant(name: str) -> dict[str, Any]:
    """Plant a fault, train a small recipe captured, and return what `observe` saw; an empty name plants none."""
    data = synthetic(96, 20, seed=0)
    idle = ANOTHER_RANK in name
    recipe = small("apple_8gpu" if idle else "speedrun", whitening_bias_epochs=0.0, tta="none")
    cpu = run(recipe, data, "cpu", ranks=BesideAnIdleRank() if idle else ALONE)
    for edit in MUTANTS.get(name, ()):
        edit.apply()
    try:
        return observe(
            replace(recipe, cuda_graph="on"), data, cpu, ranks=BesideAnIdleRank(backend="nccl") if idle else ALONE
        )
    except Exception as error:  # a fault may show as one, too
        return {"error": f"{type(error).__name__}: {error}"}


# ---- Budgets ----


def blank(n_train: int, n_test: int) -> Dataset:
    """Return black images of class 0, and one with a spot: enough where nothing is computed."""
    classes = tuple(map(str, range(10)))
    images = [torch.zeros(n, 3, 32, 32, dtype=torch.uint8) for n in (n_train, n_test)]
    images[0][0, 0, 0, 0] = 1  # training refuses images without any variation
    labels = [torch.zeros(n, dtype=torch.long) for n in (n_train, n_test)]
    return Dataset("blank", classes, images[0], labels[0], images[1], labels[1], "blank", "")


def measure_launches(
    name: str, captured: bool, compile: str = "off", resolutions: Sequence[int] = (), fuse_norm: bool = True
) -> dict[str, Any]:
    """Train a recipe at full size for two short epochs in launch mode; return what each part asks of the GPU.

    What a step asks for is that of the second epoch, with the second of the `resolutions`.
    """
    from gpu_rehearsal import launches

    watch = launches.enter(watched=compile == "off")
    recipe = replace(
        named(name),
        cuda_graph="on" if captured else "off",
        compile=compile,
        fuse_norm=fuse_norm,
        resolutions=tuple(resolutions),
        epochs=2.0,
        flat_epochs=0.0,
        tta_margin=1.0,  # how many images a margin spares depends on numbers, of which there are none
        whitening_bias_epochs=0.5 if named(name).whitening_bias_epochs else 0.0,
    )
    parts: dict[str, list[tuple[int, int]]] = {}
    steps: list[tuple[int, Counter[str]]] = []

    def timed(part: str) -> None:
        function = getattr(loop, part)

        def marked(*args: Any, **kwargs: Any) -> Any:
            begin = n_calls()
            try:
                return function(*args, **kwargs)
            finally:
                parts.setdefault(part, []).append((begin, n_calls()))

        setattr(loop, part, marked)

    for part in ("set_up", "prepare_step", "train_epoch", "evaluate_together"):
        timed(part)
    data = blank(10_240, 10_000)
    result = run(recipe, data, "cuda", on_step=lambda done, total: steps.append((n_calls(), watch.executed.copy())))
    per_epoch = len(steps) // 2
    epoch_begin, epoch_end = parts["train_epoch"][1]
    second = steps[per_epoch:]
    step_kinds = [by_kind(calls(a, b)) for (a, _), (b, _) in zip(second, second[1:], strict=False)]
    # Averages are moved every few steps only: the commonest step is one without.
    usual = max(range(len(step_kinds)), key=lambda i: step_kinds.count(step_kinds[i]))
    begin, end = second[usual][0], second[usual + 1][0]
    everything = calls()
    numbers = sorted({call.capture for call in everything if call.capture})
    graphs = [[call for call in everything if call.capture == number] for number in numbers]
    # The first graphs make a batch, one for each size; the last one updates the weights with the whitening bias frozen.
    makes = max(1, len(set(resolutions)))
    used = slice(makes - 1, makes), slice(-1, None)
    replayed = [call for part in used for graph in graphs[part] for call in graph]
    executed = [call for call in everything[begin:end] if not call.capture]
    converted = second[usual + 1][1] - second[usual][1]
    for part in used:
        for counter in watch.captured[part]:
            converted += counter
    work = launches.work_by_name(executed + replayed)
    families: Counter[str] = Counter()
    for kernel, count in work.items():
        families[launches.family(kernel)] += count
    return {
        "step mode": result.environment["step_mode"],
        "reason": result.environment["step_mode_reason"],
        "setting up": by_kind(everything[slice(*parts["set_up"][0])]),
        "step": by_kind(executed),
        "steps of an epoch": by_kind(everything[epoch_begin : second[-1][0]]),
        "end of an epoch": by_kind(everything[second[-1][0] : epoch_end]),
        "evaluation": by_kind(everything[slice(*parts["evaluate_together"][0])]),
        "evaluation with tta": by_kind(everything[slice(*parts["evaluate_together"][1])]),
        "nodes of the graphs": [len(graph) for graph in graphs],
        "conversions of a step": converted,
        "kernels of a step": families,
        "names": work,
        "violations": [call.name for call in everything if call.kind == "violation"],
        "warm-up seconds": result.warm_up_seconds,
    }


# ---- What each kernel works on ----


def count_work(
    name: str, side: int = 32, compile: str = "off", n_train: int = 50_000, **changes: Any
) -> dict[str, Any]:
    """Train a recipe, with some fields changed, for two short epochs of captured steps in launch mode; return what its
    kernels do.

    `set-up`, each state of the whitening bias in `steps`, and `rest of two epochs` list each `work.Kernel` as a list,
    which ends with how often it occurs. Images are `side` pixels wide.
    """
    from gpu_rehearsal import launches, work

    launches.enter(watched=False)
    recorder = work.Recorder()
    recorder.install()
    recipe = replace(
        named(name),
        cuda_graph="on",
        compile=compile,
        resolutions=(side,),
        epochs=2.0,
        flat_epochs=0.0,
        whitening_bias_epochs=0.5 if named(name).whitening_bias_epochs else 0.0,
        **changes,
    )
    marks: dict[str, list[tuple[int, int]]] = {}
    steps: list[int] = []

    def marked(module: Any, part: str, stage: str) -> None:
        function = getattr(module, part)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = n_calls()
            with recorder.within(stage), recorder:
                result = function(*args, **kwargs)
            marks.setdefault(part, []).append((begin, n_calls()))
            return result

        setattr(module, part, call)

    # Compiling lies between the first two and is not watched: torch compiles nothing that is.
    marked(loop, "set_up", "set-up")
    marked(capture, "_capture", "optimiser")
    marked(loop, "train_epoch", "optimiser")
    result = run(recipe, blank(n_train, 100), "cuda", on_step=lambda done, total: steps.append(n_calls()))
    # The learning rates, the arguments of the graphs, the copies of loss and accuracy: what no graph holds.
    executed = recorder.between(steps[-2], steps[-1])
    (captures,) = marks["_capture"]
    graphs = [(stage, recorder.between(*captures, number)) for stage, number in recorder.graphs]
    (batch,) = [kernels for stage, kernels in graphs if stage == "batch"]
    updates = [kernels for stage, kernels in graphs if stage == "optimiser"]
    # The whitening bias is learned first, if it is ever learned.
    states = {"frozen": updates[-1]} | ({"learned": updates[0]} if len(updates) > 1 else {})
    epochs = sum((recorder.between(*each) for each in marks["train_epoch"]), Counter[work.Kernel]())
    of_steps = Counter({kernel: len(steps) * count for kernel, count in executed.items()})

    def listed(kernels: Counter[work.Kernel]) -> list[list[Any]]:
        return [[*astuple(kernel), count] for kernel, count in kernels.items()]

    return {
        "step mode": result.environment["step_mode"],
        "reason": result.environment["step_mode_reason"],
        "torch": torch.__version__,
        "set-up": listed(recorder.between(*marks["set_up"][0])),
        "steps": {state: listed(batch + update + executed) for state, update in states.items()},
        "rest of two epochs": listed(epochs - of_steps),
        "violations": [call.name for call in calls() if call.kind == "violation"],
    }


def count_known_operations() -> dict[str, list[list[Any]]]:
    """Do some small operations; return the bytes and floating-point operations of each kernel, by its operation."""
    from gpu_rehearsal import launches, work

    @torch.library.custom_op(f"{work.NAMESPACE}::rehearsed", mutates_args=())
    def own(x: Tensor) -> Tensor:
        return (x.float() * 2).half()

    launches.enter(watched=False)
    recorder = work.Recorder()
    a, b = (torch.empty(100, 200, dtype=torch.float16, device="cuda") for _ in range(2))
    row, bank = torch.empty(200, dtype=torch.float16, device="cuda"), torch.empty(40, 100, device="cuda").half()
    operations = {
        "a + b": lambda: a + b,
        "a + a": lambda: a + a,
        "a + row": lambda: a + row,
        "a += b": lambda: a.add_(b),
        "a := b": lambda: a.copy_(b.T.contiguous().T),
        "as float32": lambda: a.float(),
        "a view": lambda: a.view(-1)[10:],
        "row repeated": lambda: row.expand(100, 200).clone(),
        "three rows of a": lambda: a.index_select(0, torch.tensor([1, 2, 3]).to("cuda")),
        "bank @ a": lambda: bank @ a,
        "own operator": lambda: own(a),
    }
    found: dict[str, list[list[Any]]] = {}
    for name, operation in operations.items():
        begin = n_calls()
        with recorder:
            operation()
        kernels = recorder.between(begin, n_calls())
        found[name] = [[kernel.family, kernel.n_bytes, kernel.flop] for kernel in kernels.elements()]
    return found


# ---- Several GPUs ----

OWN_LOSS = """
def confident(logits, labels):
    log_p = logits.log_softmax(1)
    return -log_p.gather(1, labels[:, None])[:, 0] + 0.1 * (log_p.exp() * log_p).sum(1)


tricks = Tricks(name="confidence", loss=confident)
"""


def eight_ranks(folder: str) -> dict[str, Any]:
    """Train `apple_8gpu`, small, with a loss from a notebook cell, in eight processes after CUDA was used here, and in
    one on the CPU; compare.
    """
    tricks = run_cell(OWN_LOSS)["tricks"]
    data = synthetic(128, 16, seed=0)  # two steps
    recipe = small(
        "apple_8gpu",
        n_shards=8,
        global_batch_size=64,
        ghost_batch_size=4,
        widths=(2, 2, 4, 4),
        epochs=1.0,
        flat_epochs=0.2,
    )
    seen: list[list[float]] = []
    os.environ[ranks.REPORTS] = folder
    torch.zeros(1, device="cuda").add_(1)  # CUDA is in use before any process is started
    torch.cuda.synchronize()
    several = launch_module.launch(
        replace(recipe, cuda_graph="on"),
        data,
        device="cuda",
        world_size=8,
        timeout=60.0,
        progress=False,
        tricks=tricks,
    )
    ranks.watch_batches(seen)
    one = run(recipe, data, "cpu", tricks=tricks)
    environment = {key: several.environment[key] for key in ("world_size", "backend", "step_mode", "step_mode_reason")}
    return differences(several, one) | environment | {"seen": seen, "tricks": several.tricks["name"]}


# ---- The process ----

DONE_HERE = (compare_with_cpu, run_mutant, measure_launches, count_work, count_known_operations, eight_ranks)
TASKS: dict[str, Any] = {function.__name__: function for function in DONE_HERE}


def do(order: dict[str, Any]) -> dict[str, Any]:
    """Do a task in a fork of this process; return its value, or why there is none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # only answers go to this process's standard output
        os.environ.update(order["environment"])
        try:
            answer = {"value": TASKS[order["task"]](**order["arguments"])}
        except BaseException:
            answer = {"failure": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        if not select.select([pipe], [], [], order["seconds"])[0]:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"failure": f"no answer; the process ended with status {status}"}


def main() -> None:
    """Do what standard input orders, a line each, until it ends."""
    torch.optim.SGD([torch.zeros(1)])  # which imports torch's compiler: once, instead of in each fork
    gc.collect()
    gc.freeze()  # what all forks share need not be searched for garbage by any
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
