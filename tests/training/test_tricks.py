"""A reader's own parts train like the recipe's: on any number of processes, with their source kept, refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cells import CELLS, run_cell, tricks_of
from torch import Tensor, nn

import cifar_fast as cf
from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.ranks import Ranks
from cifar_fast.errors import RankError, RunError, TrainingError, TricksError
from cifar_fast.hardware.cuda_graph import StepMode
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import TrainBatches
from cifar_fast.training.evaluate import predict_logits
from cifar_fast.training.gradients import in_memory_order
from cifar_fast.training.result import RunResult
from cifar_fast.training.tricks import Tricks

launching = import_module("cifar_fast.distributed.launch")
CPU = torch.device("cpu")
SHARED = replace(
    recipes.smoke(),
    n_shards=2,
    widths=(8, 8, 8),
    global_batch_size=32,
    epochs=1.5,
    precision="float64",
    tta="none",
    peak_lr=0.1,  # gentle enough for any network
    bias_lr_scale=1.0,
    weight_decay=5e-4,
    bias_weight_decay_scale=1.0,
    muon_lr=0.05,
)
QUICK = replace(SHARED, n_shards=1, precision="float32", convolution="direct", epochs=0.5)


@pytest.fixture(scope="module")
def few(tiny_data: Dataset) -> Dataset:
    """80 training and 20 test images."""
    cut = {"train_images": 80, "train_labels": 80, "test_images": 20, "test_labels": 20}
    return replace(tiny_data, **{name: getattr(tiny_data, name)[:n] for name, n in cut.items()})


def run(recipe: Recipe, data: Dataset, tricks: Tricks | None = None, **options: Any) -> RunResult:
    return cf.train(recipe, data, tricks=tricks or Tricks(), device="cpu", progress=False, **options)


def state(result: RunResult) -> dict[str, Tensor]:
    return {name: value for name, value in result.model.state_dict().items() if value.is_floating_point()}


def assert_same(a: RunResult, b: RunResult) -> None:
    for name, value in state(a).items():
        torch.testing.assert_close(value, state(b)[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(a.epochs, b.epochs, strict=True):
        assert (one.train_loss, one.test_loss) == pytest.approx((other.train_loss, other.test_loss), abs=1e-9)
        assert (one.train_accuracy, one.test_accuracy) == (other.train_accuracy, other.test_accuracy)


# --- the same on two processes ---


class Student(nn.Module):
    """A network as a student writes it: `view`, dropout, a batch norm of vectors, an unused layer, a shared weight."""

    def __init__(self, n_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5, stride=2), nn.Conv2d(6, 6, 3, stride=2)
        self.again, self.unused = self.conv2, nn.Linear(3, 3)
        self.norm, self.fc = nn.BatchNorm1d(6 * 2 * 2, momentum=None), nn.Linear(6 * 2 * 2, n_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return self.fc(self.dropout(self.norm(x.view(len(x), -1))))


def adam(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def test_own_parts_compute_the_same_on_two_processes_as_on_one(few: Dataset, tmp_path: Path) -> None:
    plain = run(SHARED, few)
    student = Tricks(
        model=lambda recipe, n_classes: Student(n_classes),
        optimizers=adam,
        loss=focal,
        schedule=lambda epoch: 1 / (1 + epoch),
    )
    with cf.Trainer(few, world_size=2, device="cpu", timeout=60.0) as pair:
        for tricks in [*map(tricks_of, CELLS), student]:
            alone, together = run(SHARED, few, tricks), pair.train(SHARED, tricks=tricks, progress=False)
            assert_same(alone, together)
            assert alone.tricks == together.tricks == tricks.describe()
            if state(alone).keys() == state(plain).keys():
                assert any(not torch.equal(value, state(plain)[name]) for name, value in state(alone).items())
        pair.warm_up(SHARED, Tricks(on_step=fail_on_rank_1))  # callbacks are not called there
        with (
            open(tmp_path / "log", "w") as file,
            pytest.raises(TricksError, match="the on_step .* holds 'file', the open file"),
        ):
            pair.train(SHARED, tricks=Tricks(on_step=lambda step: file.write("x")))
        assert len(pair.pids) == 2, "what is refused before it starts leaves the processes alone"
        with pytest.raises(RankError, match=r"^rank 1 failed \(raised in fail_on_rank_1, the loss of the tricks\)"):
            pair.train(SHARED, tricks=Tricks(loss=fail_on_rank_1), progress=False)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


def fail_on_rank_1(*_: object) -> Tensor:
    if torch.distributed.get_rank() == 1:
        raise ZeroDivisionError("only here")
    return focal(*_)  # type: ignore[arg-type]


# --- in one process ---


def test_a_mean_and_a_loss_for_each_image_are_the_same_as_the_recipes(few: Dataset) -> None:
    plain = run(replace(SHARED, n_shards=1, label_smoothing=0.0), few)
    for loss in (F.cross_entropy, lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")):
        assert_same(run(replace(SHARED, n_shards=1, label_smoothing=0.3), few, Tricks(loss=loss)), plain)


def test_the_recipes_own_functions_as_tricks_change_nothing(few: Dataset) -> None:
    from cifar_fast.training.model import recipe_layers
    from cifar_fast.training.optim import build_optimizers, lr_schedule

    assert SHARED.whitening_size, "a model built of our layers is whitened, too"
    recipe = replace(SHARED, crop_padding=0, flip="none", channels_last=False)
    same = Tricks(
        model=recipe_layers,
        optimizers=build_optimizers,
        schedule=lr_schedule(recipe),
        augment=lambda images, labels, generator: (images, labels),
    )
    assert_same(run(recipe, few, same), run(recipe, few))


def test_what_a_student_writes_trains_with_every_field_of_the_recipe(few: Dataset, tmp_path: Path) -> None:
    fields = {"ema_decay": 0.5, "ema_every": 1, "lookahead_alpha": 0.5, "lookahead_every": 2, "precision": "bfloat16"}
    recipe = replace(SHARED, **fields, tta="flip_shift", micro_batch_size=8, ghost_batch_size=4)
    student = Tricks(model=lambda recipe, n_classes: Student(n_classes, dropout=0.5))
    first = run(recipe, few, student, out=tmp_path / "run")
    torch.manual_seed(99)
    again = run(recipe, few, student)
    assert all(torch.equal(value, state(again)[name]) for name, value in state(first).items()), "dropout is seeded"
    assert "the model is the reader's own" in first.environment["numerics_reason"]
    loaded = cf.load_run(tmp_path / "run", tricks=student)
    logits = [predict_logits(each.model, few.test_images, tta="flip") for each in (first, loaded)]
    assert torch.equal(*logits)
    before = torch.get_rng_state()
    run(QUICK, few, student)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left as it was"


def test_callbacks_see_every_step_and_epoch(few: Dataset) -> None:
    steps, epochs = [], []
    tricks = Tricks(
        on_step=lambda step: steps.append((step.done, step.optimizers[0].param_groups[0]["lr"])),
        on_epoch=lambda epoch, step: epochs.append((epoch.epoch, step.done)),
        schedule=lambda epoch: 10 + epoch,
    )
    run(replace(QUICK, epochs=2.0), few, tricks)
    assert [done for done, _ in steps] == [1, 2, 3, 4] and epochs == [(1, 2), (2, 4)]
    assert [rate / QUICK.peak_lr for _, rate in steps] == pytest.approx([10, 10.5, 11, 11.5])


def test_an_augmentation_gets_normalised_images_in_the_recipes_order_and_draws_anew_each_step(few: Dataset) -> None:
    seen: list[tuple[Tensor, Tensor, float]] = []

    def watch(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.append((images.clone(), labels, torch.rand((), generator=generator).item()))
        return torch.zeros_like(images), labels

    recipe = Tricks(augment=watch).fitted(SHARED)
    batches = TrainBatches(few.train_images, few.train_labels, recipe, device=CPU, augment=watch)
    made = [batch for epoch in (0, 1) for batch in batches.epoch(epoch)]
    assert not any(images.any() for images, _ in made)
    assert [len(images) for images, *_ in seen] == [16] * 8, "each shard's local batch"
    assert len({draw for *_, draw in seen}) == 8
    same_order = [labels for _, labels in TrainBatches(few.train_images, few.train_labels, SHARED, device=CPU).epoch(0)]
    assert torch.equal(torch.cat(same_order), torch.cat([labels for _, labels, _ in seen[:4]]))
    pixels = few.train_images.float()
    expected = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    differences = (seen[0][0][0] - expected).abs().amax((1, 2, 3))
    assert differences.min() < 1e-3, "an image as it is, not cropped or mirrored"


# --- what is refused, and how it is said ---


def half(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [p for name, p in model.named_parameters() if not name.startswith(("block2", "block3"))], lr=0.1
    )


def wide(recipe: Recipe, n_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 12))


@pytest.mark.parametrize(
    ("tricks", "message"),
    [
        (Tricks(model=wide), r"the model returned \(32, 12\) for 32 images; \(32, 10\) was expected"),
        (Tricks(model=lambda recipe, n: 7), "`model` returned int; it must return an nn.Module"),
        (Tricks(model=lambda recipe, n: nn.Identity()), "without a parameter to learn"),
        (Tricks(model=lambda recipe, n: nn.LazyLinear(n)), "sizes are not known yet: weight, bias"),
        (Tricks(optimizers=half), r"`optimizers` misses block2a.conv.weight, .*block3a.conv.weight and 3 more"),
        (Tricks(optimizers=lambda m, r: [adam(m, r), adam(m, r)]), "more than once: each step would move them twice"),
        (Tricks(optimizers=lambda m, r: [torch.optim.LBFGS(m.parameters())]), "LBFGS needs closure for a step"),
        (Tricks(optimizers=lambda m, r: adam(wide(r, 10), r)), "2 tensors that are not parameters of the model"),
        (Tricks(optimizers=lambda m, r: [0.1]), "`optimizers` returned float; it must return a list of Optimizers"),
        (Tricks(loss=lambda logits, labels: logits), r"the loss returned \(32, 10\) for 32 images"),
        (Tricks(loss=lambda logits, labels: F.cross_entropy(logits, labels).item()), "the loss returned float"),
        (Tricks(loss=lambda logits, labels: F.cross_entropy(logits, labels).detach()), "the loss has no gradient"),
        (Tricks(augment=lambda x, y, g: (x[:3], y[:3])), r"`augment` returned \(3, 3, 32, 32\) and \(3,\)"),
        (Tricks(augment=lambda x, y, g: x), "`augment` returned Tensor; return as many images as it got"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of lazy layers
def test_a_part_that_does_not_fit_is_refused(few: Dataset, tricks: Tricks, message: str) -> None:
    with pytest.raises(TricksError, match=message):
        run(QUICK, few, tricks)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TricksError, match="loss=0.5 must be a function; write loss=my_function, without a call"):
        Tricks(loss=0.5)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_gets_fitting_advice(few: Dataset) -> None:
    with pytest.raises(
        TrainingError, match="look for a logarithm .* in your `loss`, lower the learning rates that"
    ) as e:
        run(QUICK, few, Tricks(loss=lambda logits, labels: (logits * torch.nan).sum(1), optimizers=adam))
    assert "peak_lr" not in str(e.value)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launching, "WatchedProcesses", refuse)


def travellers() -> Iterator[tuple[Callable[..., Any], str]]:
    lock, there = threading.Lock(), torch.zeros(3, device="meta")
    holder = {"of": [there]}

    class Held:
        def __init__(self) -> None:
            self.file = open(__file__)  # noqa: SIM115

        def __call__(self, *_: object) -> None: ...

    def inner() -> object:
        return lock

    yield (lambda *_: inner()), "'lock', a lock"
    yield (lambda *_: holder), r"a tensor on meta"
    yield Held(), "'file', the open file .*test_tricks.py"


def test_what_cannot_travel_is_refused_by_name_before_a_process_starts(
    few: Dataset, nothing_starts: None, tmp_path: Path
) -> None:
    for function, message in travellers():
        tricks = Tricks(loss=function)
        with pytest.raises(TricksError, match=f"the loss .* cannot be sent to other processes, .* {message}"):
            cf.launch(SHARED, few, tricks=tricks, world_size=2, device="cpu")
        with pytest.raises(TricksError, match=message):
            cf.benchmark(SHARED, few, tricks=tricks, world_size=2, device="cpu", out=tmp_path / "no")
        with pytest.raises(TricksError, match=message):
            cf.ablation(SHARED, few, {"mine": tricks}, world_size=2, device="cpu")
    assert not (tmp_path / "no").exists()


def test_on_a_gpu_own_parts_run_eagerly_unless_the_recipe_insists() -> None:
    both, recipe = StepMode(True, True), replace(QUICK, cuda_graph="auto", compile="auto")
    assert Tricks(schedule=float, on_step=print).restricted(both, recipe) == both
    own = Tricks(model=wide, loss=focal)
    mode = own.restricted(both, recipe)
    assert (mode.cuda_graph, mode.compile) == (False, False)
    assert "no cuda_graph: the model and the loss may not suit it" in mode.describe()["step_mode_reason"]
    assert own.restricted(both, replace(recipe, cuda_graph="on", compile="on")) == both
    never = Tricks(optimizers=adam).restricted(both, replace(recipe, cuda_graph="on"))
    assert (never.cuda_graph, never.compile) == (False, True) and "the optimizers" in never.reasons[0]


# --- what a result keeps ---


COUNTED = """
FACTOR = 2.0

def helper(x):
    return FACTOR * x

class Holder:
    size = 3

    def call(self, x):
        return helper(x)

def loss(logits, labels):
    return Holder().call(logits).sum(1) * images.data

tricks = Tricks(loss=loss)
"""


@pytest.mark.parametrize(
    ("old", "new"), [("2.0", "3.0"), ("FACTOR * x", "FACTOR + x"), ("size = 3", "size = 4"), ("sum(1)", "mean(1)")]
)
def test_a_fingerprint_follows_the_source_and_all_it_refers_to(old: str, new: str) -> None:
    def fingerprint(source: str, **variables: Any) -> str:
        return run_cell(source, **variables)["tricks"].fingerprint()

    before = fingerprint(COUNTED)
    assert fingerprint("\n\n" + COUNTED) == before, "another place is no other code"
    assert fingerprint(COUNTED, data=torch.zeros(2)) == before, "an attribute is no global of that name"
    assert fingerprint(COUNTED.replace(old, new)) != before
    assert fingerprint(COUNTED, images=torch.zeros(2)) != fingerprint(COUNTED, images=torch.ones(2))
    code = run_cell(COUNTED)["tricks"].code("loss")
    assert "FACTOR = 2.0" in code.source and "def helper" in code.source and "class Holder" in code.source


def test_code_without_source_has_a_fingerprint_too() -> None:
    def loss(source: str) -> Tricks:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(source, namespace)
        return Tricks(loss=namespace["loss"])

    one, same, other = (loss(f"def loss(a, b):\n    return a * {n}\n") for n in (2, 2, 3))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert "cannot be found" in one.code("loss").source


def test_a_run_folder_keeps_the_source_and_the_network_needs_its_function(few: Dataset, tmp_path: Path) -> None:
    result = run(QUICK, few, tricks_of("resnet"), out=tmp_path / "run")
    assert CELLS["resnet"].partition("def ")[2].partition("\n\n\n")[0] in (tmp_path / "run" / "tricks.py").read_text()
    history = cf.load_run(tmp_path / "run")
    assert history.epochs == result.epochs and history.to_dict() == result.to_dict()
    with pytest.raises(RunError, match=r"built by the function 'small_resnet'.*load_run\(.*tricks=Tricks\(model=...\)"):
        history.model(few.test_images)
    with pytest.raises(RunError, match="small_resnet"):
        history.model.state_dict()
    whole = cf.load_run(tmp_path / "run", tricks=tricks_of("resnet"))
    assert torch.equal(*(predict_logits(each.model, few.test_images) for each in (result, whole)))
    edited = run_cell(CELLS["resnet"].replace("7x7", "seven by seven"))["tricks"]
    with pytest.warns(UserWarning, match="trained with another source of `model`"):
        cf.load_run(tmp_path / "run", tricks=edited)
    with pytest.raises(RunError, match="do not fit"):
        cf.load_run(tmp_path / "run", tricks=Tricks(model=wide))


# --- what a stranger's network asks of the ranks ---


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 3, 2)])
def test_a_gradient_is_flattened_as_it_lies_in_memory_whatever_its_layout(order: tuple[int, ...]) -> None:
    stored = torch.arange(2 * 1 * 3 * 4.0).view(2, 1, 3, 4)
    gradient = stored.permute(order)
    flat = in_memory_order(gradient)
    assert torch.equal(flat, stored.view(-1)) and flat.data_ptr() == stored.data_ptr()


def test_a_network_without_batch_norm_has_no_statistics_to_average() -> None:
    Ranks(0, 2, "gloo").average_statistics(nn.Linear(2, 2))  # nobody else would answer


@pytest.mark.gpu
def test_on_a_gpu_own_parts_compute_what_they_do_on_a_cpu_and_a_loss_can_be_captured(few: Dataset) -> None:
    for name in CELLS:
        on_cpu, on_gpu = (
            cf.train(SHARED, few, tricks=tricks_of(name), device=device, progress=False) for device in ("cpu", "cuda")
        )
        for one, other in zip(on_cpu.epochs, on_gpu.epochs, strict=True):
            assert (one.train_loss, one.test_loss) == pytest.approx((other.train_loss, other.test_loss), rel=1e-6)
    mixed = tricks_of("mixup").merged(Tricks(loss=lambda logits, labels: F.cross_entropy(logits, labels)))
    runs = [
        cf.train(replace(QUICK, epochs=2.0, cuda_graph=how), few, tricks=mixed, device="cuda", progress=False)
        for how in ("auto", "on")
    ]
    assert [run.environment["step_mode"] for run in runs] == ["eager", "captured"]
    assert runs[0].loss == pytest.approx(runs[1].loss, rel=1e-3)
