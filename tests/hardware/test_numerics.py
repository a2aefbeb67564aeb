"""Each machine gets a precision and a convolution that it can compute, and the reason is given."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cifar_fast import recipes
from cifar_fast.errors import UserError
from cifar_fast.hardware import numerics as chosen
from cifar_fast.hardware.cuda_graph import choose_step_mode
from cifar_fast.hardware.numerics import (
    DTYPES,
    WAYS,
    Capabilities,
    Numerics,
    Way,
    _not_far_too_slow,
    capabilities,
    choose_numerics,
    convolution_rates,
    half_precision_is_right,
    needs_measuring,
    saved_rates,
)
from cifar_fast.kernels import amx, fused, fused_gpu, winograd
from cifar_fast.recipe import Recipe

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
WINOGRAD, DIRECT, BFLOAT16, AMX = WAYS


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[Way, float]:
    """GFLOP/s that this CPU is said to reach; a test changes them as it likes."""
    rates = {WINOGRAD: 300.0, DIRECT: 100.0, BFLOAT16: 200.0, AMX: 220.0}
    monkeypatch.setattr(chosen, "convolution_rates", lambda: rates)
    for kernel in (winograd, amx, fused):
        monkeypatch.setattr(kernel, "available", lambda: (True, "/cache/kernel.so"))
    return rates


@pytest.fixture
def no_compiler(rates: dict[Way, float], monkeypatch: pytest.MonkeyPatch) -> None:
    del rates[WINOGRAD], rates[AMX]
    for kernel in (winograd, amx, fused):
        monkeypatch.setattr(kernel, "available", lambda: (False, "there is no C compiler"))


@pytest.fixture
def no_amx(rates: dict[Way, float], monkeypatch: pytest.MonkeyPatch) -> None:
    del rates[AMX]
    monkeypatch.setattr(amx, "available", lambda: (False, "this processor has no AMX"))


def with_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


# --- On a CPU ---


@pytest.mark.parametrize(
    ("precision", "convolution", "fastest", "expected"),
    [
        ("auto", "auto", WINOGRAD, WINOGRAD),
        ("auto", "auto", BFLOAT16, BFLOAT16),
        ("auto", "auto", DIRECT, DIRECT),
        ("auto", "auto", AMX, AMX),
        ("auto", "direct", WINOGRAD, BFLOAT16),
        ("auto", "direct", DIRECT, DIRECT),
        ("auto", "direct", AMX, BFLOAT16),
        ("auto", "winograd", BFLOAT16, WINOGRAD),
        ("auto", "amx", WINOGRAD, AMX),
        ("float32", "auto", BFLOAT16, WINOGRAD),
        ("float32", "auto", DIRECT, DIRECT),
        ("float32", "auto", AMX, WINOGRAD),
        ("float32", "direct", WINOGRAD, DIRECT),
        ("float32", "winograd", DIRECT, WINOGRAD),
        ("bfloat16", "auto", WINOGRAD, BFLOAT16),
        ("bfloat16", "auto", AMX, AMX),
        ("bfloat16", "direct", AMX, BFLOAT16),
        ("bfloat16", "amx", BFLOAT16, AMX),
    ],
)
def test_a_cpu_takes_the_fastest_way_that_the_recipe_allows(
    precision: str, convolution: str, fastest: Way, expected: Way, rates: dict[Way, float]
) -> None:
    rates[fastest] = 1000.0
    numerics = choose_numerics(Recipe(precision=precision, convolution=convolution), CPU)
    described = numerics.describe()
    assert (described["precision"], described["convolution"]) == expected
    assert (numerics.dtype, numerics.convolution) == (DTYPES[expected.precision], expected.convolution)


@pytest.mark.parametrize("noise", [0.9, 1.0, 1.1])
def test_noise_in_the_measurement_does_not_change_the_choice(noise: float, rates: dict[Way, float]) -> None:
    rates.update({WINOGRAD: 300.0, DIRECT: 300.0 * noise, BFLOAT16: 300.0 / noise, AMX: 300.0 * noise})
    assert choose_numerics(Recipe(), CPU).convolution == "winograd"
    assert choose_numerics(Recipe(precision="bfloat16"), CPU).convolution == "direct"


@pytest.mark.usefixtures("no_amx")
def test_nothing_is_measured_where_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> dict[Way, float]:
        raise AssertionError("measured")

    monkeypatch.setattr(chosen, "convolution_rates", measure)
    assert choose_numerics(Recipe(precision="float32", convolution="direct"), CPU).dtype == torch.float32
    assert choose_numerics(Recipe(precision="bfloat16"), CPU).dtype == torch.bfloat16


def test_the_reason_gives_the_rates(rates: dict[Way, float]) -> None:
    reason = choose_numerics(Recipe(), CPU).reason
    assert "measured" in reason and all(f"{way} {rate:.0f}" in reason for way, rate in rates.items())


def test_float16_becomes_float32_on_a_cpu_and_the_reason_says_so(rates: dict[Way, float]) -> None:
    numerics = choose_numerics(Recipe(precision="float16"), CPU)
    assert (numerics.dtype, numerics.convolution) == (torch.float32, "direct")
    assert "float16" in numerics.reason and "float32 instead" in numerics.reason


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("convolution", ["winograd", "amx"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_a_compiler_convolutions_are_direct_and_the_reason_is_given(convolution: str, precision: str) -> None:
    numerics = choose_numerics(Recipe(precision=precision, convolution=convolution), CPU)
    assert (numerics.dtype, numerics.convolution, numerics.fuse_norm) == (DTYPES[precision], "direct", False)
    assert numerics.reason == f"no {convolution} convolution here: there is no C compiler; direct instead"


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize(("precision", "convolution"), [("bfloat16", "winograd"), ("float32", "amx")])
def test_a_convolution_that_does_not_exist_in_the_precision_is_replaced(precision: str, convolution: str) -> None:
    numerics = choose_numerics(Recipe(precision=precision, convolution=convolution), CPU)
    assert (numerics.dtype, numerics.convolution) == (DTYPES[precision], "direct")
    (only,) = {"float32", "bfloat16"} - {precision}
    assert numerics.reason == f"no {convolution} convolution here: it exists only in {only}; direct instead"


@pytest.mark.usefixtures("no_amx")
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_a_processor_without_amx_is_named_as_the_reason(precision: str) -> None:
    numerics = choose_numerics(Recipe(precision=precision, convolution="amx"), CPU)
    assert numerics.convolution == "direct" and precision in ("auto", numerics.describe()["precision"])
    assert numerics.reason == "no amx convolution here: this processor has no AMX; direct instead"


@pytest.mark.usefixtures("rates")
def test_norm_and_activation_are_fused_unless_the_recipe_or_its_precision_says_otherwise() -> None:
    assert choose_numerics(Recipe(precision="bfloat16"), CPU).describe()["fused_norm"] is True
    assert choose_numerics(Recipe(fuse_norm=False), CPU).describe()["fused_norm"] is False
    assert choose_numerics(Recipe(precision="float64"), CPU).describe()["fused_norm"] is False


def test_this_cpu_can_be_measured() -> None:
    measured = convolution_rates(4)
    assert set(measured) == {way for way in WAYS if way.convolution not in capabilities().unavailable}
    assert {DIRECT, BFLOAT16} <= measured.keys()
    assert all(rate > 0 for rate in measured.values())
    assert convolution_rates(4) is measured  # once a process: two runs in it choose the same


def test_only_a_way_that_is_slow_and_would_take_long_goes_untimed() -> None:
    # Roughly in proportion: Winograd on an EPYC with AVX-512, whose bfloat16 is fast, and bfloat16 on one with AVX2.
    assert _not_far_too_slow({WINOGRAD: 0.0148, DIRECT: 0.0035, BFLOAT16: 0.0016}, 16) == [WINOGRAD, DIRECT, BFLOAT16]
    assert _not_far_too_slow({WINOGRAD: 0.011, DIRECT: 0.021, BFLOAT16: 0.46}, 16) == [WINOGRAD, DIRECT]
    # On a slow machine everything takes long, and all that is nearly as fast as the fastest is timed.
    assert _not_far_too_slow({WINOGRAD: 2.0, DIRECT: 7.9, BFLOAT16: 8.1}, 16) == [WINOGRAD, DIRECT]


def test_a_measurement_is_saved_for_who_asks_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "_rates_file", lambda: tmp_path / "rates.json")
    assert saved_rates() is None and needs_measuring(Recipe(), CPU)
    monkeypatch.setattr(chosen, "TIMED_IMAGES", 3)
    measured = convolution_rates(3)
    assert saved_rates() == measured and not needs_measuring(Recipe(), CPU)
    monkeypatch.setattr(chosen, "cpu_name", lambda: "another processor")
    assert saved_rates() is None
    (tmp_path / "rates.json").write_text("{")
    assert saved_rates() is None
    for recipe, device in ((Recipe(precision="float64"), CPU), (Recipe(), GPU)):
        assert not needs_measuring(recipe, device)


def test_known_rates_replace_a_measurement(rates: dict[Way, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "convolution_rates", lambda: pytest.fail("measured"))
    assert choose_numerics(Recipe(), CPU, {**rates, AMX: 1000.0}).convolution == "amx"


# --- On a GPU ---


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [
        ("auto", (7, 0), torch.float16),
        ("auto", (9, 0), torch.float16),
        ("float32", (9, 0), torch.float32),
        ("float16", (7, 0), torch.float16),
        ("bfloat16", (8, 0), torch.bfloat16),
        ("bfloat16", (7, 5), torch.float16),
    ],
)
def test_a_gpu_gets_what_it_has(
    precision: str, capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_gpu(monkeypatch, capability)
    numerics = choose_numerics(Recipe(precision=precision), GPU)
    assert (numerics.dtype, numerics.convolution) == (expected, "direct")
    assert ("instead" in numerics.reason) == (precision == "bfloat16" and capability < (8, 0))


@pytest.mark.parametrize(
    ("kind", "precision", "right", "expected"),
    [
        ("mps", "auto", True, torch.float16),
        ("xpu", "auto", True, torch.bfloat16),
        ("mps", "bfloat16", True, torch.bfloat16),
        ("mps", "auto", False, torch.float32),
        ("xpu", "float16", False, torch.float32),
        ("xpu", "float32", True, torch.float32),
    ],
)
def test_other_gpus_compute_eagerly_in_half_precision_where_that_is_right(
    kind: str, precision: str, right: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "half_precision_is_right", lambda device, dtype: right)
    monkeypatch.setattr(chosen, "capabilities", lambda: pytest.fail("compiled"))
    recipe = replace(recipes.speedrun(), precision=precision)
    numerics = choose_numerics(recipe, torch.device(kind))
    assert (numerics.dtype, numerics.convolution, numerics.fuse_norm) == (expected, "direct", False)
    assert ("instead" in numerics.reason) == (not right)
    mode = choose_step_mode(recipe, torch.device(kind))
    assert mode.describe()["step_mode"] == "eager" and "not a CUDA GPU" in mode.reasons[0]


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_gpus_refuse_float64(kind: str) -> None:
    with pytest.raises(UserError, match=f"precision=float64: .* {kind} has no float64; use --device cpu"):
        choose_numerics(Recipe(precision="float64"), torch.device(kind))


def test_half_precision_is_right_where_it_agrees_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert half_precision_is_right(CPU, torch.bfloat16)
    assert not half_precision_is_right(torch.device("meta"), torch.bfloat16)  # computes nothing
    conv2d = torch.nn.functional.conv2d

    def wrong(x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        return conv2d(x, *args, **options) * (1.1 if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr(torch.nn.functional, "conv2d", wrong)
    assert not half_precision_is_right(CPU, torch.bfloat16)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A GPU with Triton and a C compiler, which runs the fused kernels unless a test says why not; what it has run."""
    with_a_gpu(monkeypatch)
    tried: list[tuple] = []
    monkeypatch.setattr(chosen, "no_triton", lambda: None)
    monkeypatch.setattr(fused_gpu, "failure", lambda *kind: tried.append(kind) or "")
    monkeypatch.setattr(chosen, "capabilities", lambda: pytest.fail("compiled C"))
    return tried


def test_a_gpu_with_triton_fuses_unless_the_recipe_says_otherwise(tried: list[tuple]) -> None:
    assert choose_numerics(Recipe(activation="celu", celu_alpha=0.3), GPU).describe()["fused_norm"] is True
    assert choose_numerics(Recipe(activation="silu", precision="float32", bn_eps=1e-3), GPU).fuse_norm
    assert tried == [(GPU, torch.float16, "celu", 0.3, 1e-5), (GPU, torch.float32, "silu", 1.0, 1e-3)]
    assert not choose_numerics(Recipe(fuse_norm=False), GPU).fuse_norm and len(tried) == 2
    assert not choose_numerics(Recipe(channels_last=False), GPU).fuse_norm and len(tried) == 2


def test_a_gpu_without_triton_fuses_nothing(tried: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "no_triton", lambda: "Triton is missing")
    with warnings.catch_warnings(action="error"):
        assert not choose_numerics(Recipe(), GPU).fuse_norm
    assert not tried


def test_kernels_that_fail_on_a_gpu_are_left_out_with_a_warning(
    tried: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_gpu, "failure", lambda *kind: "PTXASError: out of registers")
    with pytest.warns(UserWarning, match="norm and activation are not fused, because .*: PTXASError: out of registers"):
        assert not choose_numerics(Recipe(), GPU).fuse_norm


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize("name", ["laptop", "speedrun", "smoke", "page_2019", "apple_8gpu", "baseline_2018"])
def test_every_recipe_can_be_computed_on_any_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch)
    for device in (CPU, GPU):
        assert choose_numerics(recipes.named(name), device).dtype in DTYPES.values()


# --- On several ranks ---

ALL = Capabilities({}, fused_norm=True)
NO_COMPILER = Capabilities(dict.fromkeys(("winograd", "amx"), "there is no C compiler"), fused_norm=False)
NO_AMX = Capabilities({"amx": "this processor has no AMX"}, fused_norm=True)


@pytest.mark.usefixtures("no_amx")
def test_capabilities_name_what_is_missing_and_why_and_can_be_sent_to_other_ranks() -> None:
    assert capabilities() == NO_AMX
    assert pickle.loads(pickle.dumps(capabilities())) == NO_AMX


@pytest.mark.usefixtures("no_compiler")
def test_capabilities_say_that_norms_cannot_be_fused() -> None:
    assert capabilities() == NO_COMPILER


@pytest.mark.parametrize(
    ("convolution", "others", "expected", "fused_norm"),
    [
        ("amx", [ALL, ALL], "amx", True),
        ("amx", [ALL, NO_AMX], "direct", True),
        ("amx", [NO_COMPILER, ALL], "direct", False),
        ("winograd", [NO_AMX, ALL], "winograd", True),
        ("winograd", [ALL, NO_COMPILER], "direct", False),
        ("direct", [NO_COMPILER, NO_AMX], "direct", False),
        ("direct", [], "direct", True),
    ],
)
def test_ranks_leave_out_what_one_of_them_lacks(
    convolution: str, others: list[Capabilities], expected: str, fused_norm: bool
) -> None:
    chosen = Numerics(torch.bfloat16, convolution, "measured", fuse_norm=True)
    found = chosen.restricted_to(others)
    assert (found.dtype, found.convolution, found.fuse_norm) == (torch.bfloat16, expected, fused_norm)
    if expected == convolution:
        assert found.reason == "measured"
    else:
        assert found.reason == f"not every rank can compute a {convolution} convolution: direct instead"
    assert not Numerics(torch.bfloat16, convolution, "measured", fuse_norm=False).restricted_to(others).fuse_norm
