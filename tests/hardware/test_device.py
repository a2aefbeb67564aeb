"""What a machine has is found, what it lacks is replaced, and both are said."""

from __future__ import annotations

import json

import pytest
import torch

from cifar_fast import recipes
from cifar_fast.errors import UserError
from cifar_fast.hardware import device as devices
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.hardware.numerics import choose_numerics, convolution_rates
from cifar_fast.recipe import Recipe

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
WINOGRAD, DIRECT, BFLOAT16, AMX = devices.WAYS


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What this CPU is measured to do; a test changes it as it likes."""
    rates = {WINOGRAD: 300.0, DIRECT: 100.0, BFLOAT16: 200.0, AMX: 220.0}
    monkeypatch.setattr(devices, "convolution_rates", lambda: rates)
    monkeypatch.setattr(devices.winograd, "available", lambda: (True, "/cache/winograd.so"))
    monkeypatch.setattr(devices.amx, "available", lambda: (True, "/cache/amx.so"))
    return rates


@pytest.fixture
def no_compiler(rates: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    del rates[WINOGRAD], rates[AMX]
    for module in (devices.winograd, devices.amx):
        monkeypatch.setattr(module, "available", lambda: (False, "there is no C compiler"))


@pytest.fixture
def no_amx(rates: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    del rates[AMX]
    monkeypatch.setattr(devices.amx, "available", lambda: (False, "this processor has no matrix tiles"))


def with_gpus(monkeypatch: pytest.MonkeyPatch, n: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


# --- Which device ---


def test_the_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert select_device() == CPU
    with_gpus(monkeypatch, 2)
    assert select_device() == torch.device("cuda")


def test_a_device_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    assert [select_device(name) for name in ("cpu", "cuda", "cuda:1")] == [
        CPU,
        torch.device("cuda"),
        torch.device("cuda", 1),
    ]


@pytest.mark.parametrize(("name", "n_gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(name: str, n_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, n_gpus)
    with pytest.raises(UserError, match=f"device '{name}' is not there: .*{n_gpus} GPUs"):
        select_device(name)


@pytest.mark.parametrize(
    ("name", "said"), [("gpu", "not known"), ("cuda:x", "not known"), ("", "not known"), ("meta", "not supported")]
)
def test_a_device_that_is_none_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}' is {said}.*cpu"):
        select_device(name)


# --- Which precision and convolution ---


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
    precision: str, convolution: str, fastest: str, expected: str, rates: dict[str, float]
) -> None:
    rates[fastest] = 1000.0
    numerics = choose_numerics(Recipe(precision=precision, convolution=convolution), CPU)
    described = numerics.describe()
    assert f"{described['precision']} {described['convolution']}" == expected
    assert (numerics.dtype, numerics.convolution) == (devices.DTYPES[expected.split()[0]], expected.split()[1])


@pytest.mark.parametrize("noise", [0.9, 1.0, 1.1])
def test_noise_in_the_measurement_does_not_change_the_choice(noise: float, rates: dict[str, float]) -> None:
    rates.update({WINOGRAD: 300.0, DIRECT: 300.0 * noise, BFLOAT16: 300.0 / noise, AMX: 300.0 * noise})
    assert choose_numerics(Recipe(), CPU).convolution == "winograd"
    assert choose_numerics(Recipe(precision="bfloat16"), CPU).convolution == "direct"


@pytest.mark.usefixtures("no_amx")
def test_nothing_is_measured_where_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> dict[str, float]:
        raise AssertionError("measured")

    monkeypatch.setattr(devices, "convolution_rates", measure)
    assert choose_numerics(Recipe(precision="float32", convolution="direct"), CPU).dtype == torch.float32
    assert choose_numerics(Recipe(precision="bfloat16"), CPU).dtype == torch.bfloat16


def test_the_reason_has_the_rates(rates: dict[str, float]) -> None:
    reason = choose_numerics(Recipe(), CPU).reason
    assert "measured" in reason and all(f"{way} {rate:.0f}" in reason for way, rate in rates.items())


def test_float16_falls_back_on_a_cpu_and_says_so(rates: dict[str, float]) -> None:
    numerics = choose_numerics(Recipe(precision="float16"), CPU)
    assert (numerics.dtype, numerics.convolution) == (torch.float32, "direct")
    assert "float16" in numerics.reason and "float32 instead" in numerics.reason


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("convolution", ["winograd", "amx"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_loops_without_a_compiler_fall_back_and_say_so(convolution: str, precision: str) -> None:
    numerics = choose_numerics(Recipe(precision=precision, convolution=convolution), CPU)
    assert (numerics.dtype, numerics.convolution) == (devices.DTYPES[precision], "direct")
    assert numerics.reason == f"no {convolution} convolution here: there is no C compiler; direct instead"


def test_winograd_computes_in_float32_alone_and_says_so(rates: dict[str, float]) -> None:
    numerics = choose_numerics(Recipe(precision="bfloat16", convolution="winograd"), CPU)
    assert (numerics.dtype, numerics.convolution) == (torch.bfloat16, "direct")
    assert "float32 alone" in numerics.reason and "direct instead" in numerics.reason


def test_matrix_tiles_compute_in_bfloat16_alone_and_say_so(rates: dict[str, float]) -> None:
    numerics = choose_numerics(Recipe(precision="float32", convolution="amx"), CPU)
    assert (numerics.dtype, numerics.convolution) == (torch.float32, "direct")
    assert "bfloat16 alone" in numerics.reason and "direct instead" in numerics.reason


@pytest.mark.usefixtures("no_amx")
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_a_processor_without_matrix_tiles_is_named(precision: str) -> None:
    numerics = choose_numerics(Recipe(precision=precision, convolution="amx"), CPU)
    assert numerics.convolution == "direct" and precision in ("auto", numerics.describe()["precision"])
    assert numerics.reason == "no amx convolution here: this processor has no matrix tiles; direct instead"


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
    with_gpus(monkeypatch, 1, capability)
    numerics = choose_numerics(Recipe(precision=precision), GPU)
    assert (numerics.dtype, numerics.convolution) == (expected, "direct")
    assert ("instead" in numerics.reason) == (precision == "bfloat16" and capability < (8, 0))


@pytest.mark.parametrize("name", ["laptop", "speedrun", "smoke", "page_2019", "apple_8gpu", "baseline_2018"])
def test_every_recipe_gets_something_on_any_device(
    name: str, rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 1)
    for device in (CPU, GPU):
        assert choose_numerics(recipes.named(name), device).dtype in devices.DTYPES.values()


def test_this_cpu_can_be_measured() -> None:
    measured = convolution_rates()
    assert set(measured) == {way for way in devices.WAYS if devices.can_convolve(way.split()[1])[0]}
    assert {DIRECT, BFLOAT16} <= measured.keys()
    assert all(rate > 0 for rate in measured.values())
    assert convolution_rates() is measured  # once a process: two runs in it choose the same


# --- What a result stands on ---


def test_the_environment_names_hardware_and_versions_in_plain_values() -> None:
    found = environment(CPU)
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu" and found["gpu"] is None and found["cuda"] is None
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_gb"] > 0


@pytest.mark.gpu
def test_the_environment_names_the_gpu() -> None:
    found = environment(torch.device("cuda"))
    assert found["gpu"] == torch.cuda.get_device_name() and found["cuda"] == torch.version.cuda


def test_keeping_freed_memory_can_be_asked_for_twice() -> None:
    devices.keep_freed_memory()
    devices.keep_freed_memory()
