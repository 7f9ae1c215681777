"""The optimizers: twins agree, libraries agree, nothing drifts, a resumed run is the same run, sizes are as planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from jupiter_engine.backends import moments
from jupiter_engine.backends.mlx import blas

blas.preload()

import mlx.core as mx  # noqa: E402 - OpenBLAS has to be in the process first

from jupiter_engine.backends.mlx import optimizers as on_mlx  # noqa: E402
from jupiter_engine.backends.torch import optimizers as on_torch  # noqa: E402
from jupiter_engine.errors import StateError  # noqa: E402
from jupiter_engine.planning.memory import optimizer_state_bytes  # noqa: E402
from jupiter_engine.protocol.specs import OptimizerSpec  # noqa: E402
from tests.backends import optimizer_runs as runs  # noqa: E402

GOLDEN = np.load(Path(__file__).parent / "golden" / "optimizers.npz", allow_pickle=False)
MATRIX = "model.layers.0.self_attn.q_proj.weight"
TWINS = ("torch", "mlx")
by_twin = pytest.mark.parametrize("twin", TWINS)
by_name = pytest.mark.parametrize("name", runs.NAMES)


class Run:
    """Weights and their optimizer on one twin, fed numpy gradients."""

    def __init__(self, twin: str, spec: OptimizerSpec, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        self._array = torch.tensor if twin == "torch" else mx.array
        self.shapes = {name: value.shape for name, value in weights.items()}
        self.optimizer: Any = {"torch": on_torch, "mlx": on_mlx}[twin].build(spec, self.shapes)
        self._weights = {name: self._array(value) for name, value in weights.items()}
        self.steps = 0

    def go(self, gradients: Iterable[Mapping[str, npt.NDArray[Any]]], scale: float = 1.0) -> Run:
        for values in gradients:
            self.optimizer.begin()
            arrays = {name: self._array(value) for name, value in values.items()}
            self.optimizer.update_all(self._weights, arrays, runs.learning_rate(self.steps), scale)
            self.steps += 1
        return self

    @property
    def weights(self) -> dict[str, npt.NDArray[Any]]:
        return {
            name: np.array(value.numpy() if isinstance(value, torch.Tensor) else value)
            for name, value in self._weights.items()
        }

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {key: value.copy() for key, value in self.optimizer.export(self.shapes).items()}


def distance(a: npt.NDArray[Any], b: npt.NDArray[Any], start: npt.NDArray[Any]) -> float:
    """How far a and b lie apart, as a share of the way from `start` to b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - start))


def run(twin: str, name: str, shapes: runs.Shapes, steps: int, scale: float = 1.0) -> Run:
    return Run(twin, runs.spec(name), runs.start(shapes)).go(runs.gradients(shapes, steps), scale)


# -- the twins ---------------------------------------------------------------------------------------------------------


@by_name
def test_twins_take_the_same_way(name: str) -> None:
    ours, theirs = (run(twin, name, runs.SHAPES, 50, scale=0.37) for twin in TWINS)
    start, weights, others = runs.start(runs.SHAPES), ours.weights, theirs.weights
    # A sum that the twins round differently may end on the other side of a tie between two of the 256 numbers.
    near = 1e-3 if name == "adamw8bit" else 2e-5
    for key, value in weights.items():
        assert distance(others[key], value, start[key]) < near, key
    state, other = ours.state(), theirs.state()
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert value.dtype == other[key].dtype
        assert value.shape == other[key].shape
        if value.dtype == np.uint8:
            assert np.mean(value != other[key]) < 1e-3, key
        else:
            np.testing.assert_allclose(other[key], value, rtol=1e-4, atol=1e-6 * float(np.abs(value).max()))


@by_name
def test_one_update_at_a_time_equals_all_together(name: str) -> None:
    gradients = list(runs.gradients(runs.SHAPES, 3))
    for twin in TWINS:
        together = Run(twin, runs.spec(name), runs.start(runs.SHAPES)).go(gradients)
        single = Run(twin, runs.spec(name), runs.start(runs.SHAPES))
        for step, values in enumerate(gradients):
            single.optimizer.begin()
            for key, value in reversed(values.items()):
                given = single._weights[key], single._array(value), runs.learning_rate(step)
                changed = single.optimizer.update(key, *given)
                if twin == "mlx":
                    single._weights[key] = changed
        for key, value in together.weights.items():
            np.testing.assert_array_equal(single.weights[key], value)


@pytest.mark.parametrize("signed", [True, False])
def test_both_twins_find_the_nearest_of_the_256_numbers(signed: bool) -> None:
    system = moments.numbers(signed=signed)
    values, bounds = system.values.astype(np.float64), system.bounds[:-1]
    near = np.concatenate([bounds, np.nextafter(bounds, 2), np.nextafter(bounds, -2), system.values])
    random = np.random.default_rng(0).uniform(-1.0 if signed else 0.0, 1.0, 40 * 256).astype(np.float32)
    tiny = random * np.float32(1e-5)
    asked = np.concatenate([near, random, tiny])
    asked = np.append(asked, np.zeros(-len(asked) % 255, np.float32)).reshape(-1, 255)
    # A 1 in every block makes the scale 1.
    blocks = np.concatenate([asked, np.ones((len(asked), 1), np.float32)], 1).astype(np.float32)
    torch_codes, torch_scales = on_torch.EightBit(torch.device("cpu"), signed=signed).write(torch.tensor(blocks))
    mlx_codes, mlx_scales = on_mlx.EightBit(signed=signed).write(mx.array(blocks))
    np.testing.assert_array_equal(torch_codes.numpy(), np.array(mlx_codes))
    np.testing.assert_array_equal(torch_scales.numpy(), np.array(mlx_scales))
    assert set(torch_scales.tolist()) == {1.0}
    flat, codes = blocks.reshape(-1), torch_codes.numpy()
    np.testing.assert_array_equal(codes, np.searchsorted(bounds, flat, side="right"))
    chosen = np.abs(values[codes] - flat)
    best = np.abs(values[None] - flat[:, None]).min(1)
    assert np.all(chosen <= best + 2e-7 * np.abs(flat))
    read = on_torch.EightBit(torch.device("cpu"), signed=signed).read(torch_codes, torch_scales)
    np.testing.assert_array_equal(read.numpy().reshape(-1), system.values[codes])


def test_no_two_bounds_share_their_upper_bits() -> None:
    for signed in (True, False):
        upper = moments.numbers(signed=signed).bounds.view(np.uint32) >> 16
        assert len(set(upper.tolist())) == 256


# -- the libraries -----------------------------------------------------------------------------------------------------


def library_run(optimizer: Any, weights: Mapping[str, torch.nn.Parameter], steps: int) -> None:
    for step, gradients in enumerate(runs.gradients({n: tuple(w.shape) for n, w in weights.items()}, steps)):
        for group in optimizer.param_groups:
            group["lr"] = runs.learning_rate(step)
        for name, value in gradients.items():
            weights[name].grad = torch.tensor(value)
        optimizer.step()


def parameters(shapes: runs.Shapes) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.tensor(value)) for name, value in runs.start(shapes).items()}


@by_twin
def test_adamw_is_that_of_torch(twin: str) -> None:
    weights = parameters(runs.SHAPES)
    groups = [
        {"params": [w for w in weights.values() if w.ndim >= 2], "weight_decay": 0.1},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    library_run(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False), weights, 50)
    start = runs.start(runs.SHAPES)
    for name, value in run(twin, "adamw", runs.SHAPES, 50).weights.items():
        assert distance(value, weights[name].detach().numpy(), start[name]) < 2e-5, name


@by_twin
def test_adafactor_is_that_of_torch(twin: str) -> None:
    weights = parameters(runs.SHAPES)
    groups = [
        {"params": [w for w in weights.values() if w.ndim >= 2], "weight_decay": 0.1},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    library_run(torch.optim.Adafactor(groups), weights, 50)
    start = runs.start(runs.SHAPES)
    for name, value in run(twin, "adafactor", runs.SHAPES, 50).weights.items():
        assert distance(value, weights[name].detach().numpy(), start[name]) < 2e-5, name


MATRICES: runs.Shapes = {n: s for n, s in runs.SHAPES.items() if n.startswith("model.layers") and len(s) == 2}


def library_muon(steps: int) -> dict[str, torch.nn.Parameter]:
    weights = parameters(MATRICES)
    optimizer = torch.optim.Muon(
        list(weights.values()), momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    library_run(optimizer, weights, steps)
    return weights


def test_muon_in_bfloat16_is_that_of_torch_to_the_bit() -> None:
    """The precision of GPUs, tried on a CPU."""
    ours = Run("torch", runs.spec("muon"), runs.start(MATRICES))
    ours.optimizer.newton_schulz_dtype = torch.bfloat16
    ours.go(runs.gradients(MATRICES, 10))
    for name, weight in library_muon(10).items():
        np.testing.assert_array_equal(ours.weights[name], weight.detach().numpy())


@by_twin
def test_muon_in_float32_differs_from_torchs_by_its_bfloat16_only(twin: str) -> None:
    """Within 3 % of the way: Newton-Schulz itself leaves singular values between 0.7 and 1.2."""
    theirs, ours, start = library_muon(50), run(twin, "muon", MATRICES, 50).weights, runs.start(MATRICES)
    for name, weight in theirs.items():
        assert distance(ours[name], weight.detach().numpy(), start[name]) < 0.03, name


@by_twin
def test_muons_step_is_near_a_rotation_of_adamws_size(twin: str) -> None:
    """Float64 singular values: all of the step near one size, whose root mean square is 0.2 times the rate."""
    shapes = {MATRIX: (65, 70)}
    start = {MATRIX: np.zeros((65, 70), np.float32)}
    (gradient,) = runs.gradients(shapes, 1)
    step = Run(twin, runs.spec("muon"), start).go([gradient]).weights[MATRIX].astype(np.float64) / runs.RATE
    values = np.linalg.svd(step, compute_uv=False) / (0.2 * np.sqrt(70))
    assert 0.7 < np.median(values) < 1.2
    assert values.max() < 1.3
    assert 0.15 < np.sqrt(np.mean(step**2)) < 0.25


@by_twin
def test_muon_leaves_embeddings_head_and_vectors_to_adamw(twin: str) -> None:
    muon, adamw = (run(twin, name, runs.SHAPES, 5).weights for name in ("muon", "adamw"))
    same = {name for name in muon if np.array_equal(muon[name], adamw[name])}
    assert same == runs.SHAPES.keys() - MATRICES.keys()


@by_twin
def test_adamw8bit_is_that_of_torchao(twin: str) -> None:
    """Golden arrays of golden/make_optimizers.py: the same 256 numbers, the same codes but for ties."""
    shapes = runs.TORCHAO_SHAPES
    (name,) = shapes
    ours = run(twin, "adamw8bit", shapes, runs.LIBRARY_STEPS)
    state = ours.state()
    for kind, signed in (("signed", True), ("unsigned", False)):
        np.testing.assert_allclose(moments.numbers(signed=signed).values, GOLDEN[f"torchao/{kind}"], rtol=3e-7)
    for kind in ("m8", "v8"):
        difference = np.abs(state[f"{kind}.{name}"].astype(int) - GOLDEN[f"torchao/{kind}"])
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 1e-3
    for kind in ("ms", "vs"):
        np.testing.assert_allclose(state[f"{kind}.{name}"], GOLDEN[f"torchao/{kind}"], rtol=1e-5)
    assert distance(ours.weights[name], GOLDEN["torchao/weight"], runs.start(shapes)[name]) < 1e-3


@by_twin
@by_name
def test_nothing_drifts(twin: str, name: str) -> None:
    weights, start = run(twin, name, runs.SHAPES, runs.OWN_STEPS).weights, runs.start(runs.SHAPES)
    for key, value in weights.items():
        kept, origin = (array.reshape(-1)[:: runs.OWN_KEPT] for array in (value, start[key]))
        assert distance(kept, GOLDEN[f"{name}/{key}"], origin) < (1e-3 if name == "adamw8bit" else 2e-5), key


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("torch", "torch"), ("mlx", "mlx"), ("torch", "mlx"), ("mlx", "torch")])
@by_name
def test_a_resumed_run_is_the_uninterrupted_one(name: str, before: str, after: str) -> None:
    gradients = list(runs.gradients(runs.SHAPES, 20))
    whole = Run(after, runs.spec(name), runs.start(runs.SHAPES)).go(gradients)
    first = Run(before, runs.spec(name), runs.start(runs.SHAPES)).go(gradients[:9])
    second = Run(after, runs.spec(name), first.weights)
    second.optimizer.load(first.state() | {"m.of something else": np.zeros(3, np.float32)}, 9)
    second.steps = 9
    second.go(gradients[9:])
    assert second.optimizer.updates == 20
    start = runs.start(runs.SHAPES)
    for key, value in whole.weights.items():
        if before == after:
            np.testing.assert_array_equal(second.weights[key], value)
        else:
            assert distance(second.weights[key], value, start[key]) < (1e-3 if name == "adamw8bit" else 2e-5), key
    if before == after:
        for key, value in whole.state().items():
            np.testing.assert_array_equal(second.state()[key], value)


@by_twin
def test_a_state_that_does_not_fit_is_refused(twin: str) -> None:
    built = Run(twin, runs.spec("adamw8bit"), runs.start(runs.SHAPES)).go(runs.gradients(runs.SHAPES, 1))
    state = built.state()
    with pytest.raises(StateError, match="holds no m8"):
        Run(twin, runs.spec("adamw8bit"), runs.start(runs.SHAPES)).optimizer.load(
            {key: value for key, value in state.items() if not key.startswith("m8")}, 1
        )
    with pytest.raises(StateError, match=r"holds no m\..*, which muon needs") as raised:
        Run(twin, runs.spec("muon"), runs.start(runs.SHAPES)).optimizer.load(state, 1)
    assert "the optimizer that the run began with" in str(raised.value.fix)
    with pytest.raises(StateError, match="wanted is"):
        built.optimizer.load(state | {f"m8.{MATRIX}": np.zeros((65, 70), np.float32)}, 1)
    with pytest.raises(StateError, match="wanted is"):
        built.optimizer.load(state | {f"v8.{MATRIX}": np.zeros((70, 65), np.uint8)}, 1)


@by_twin
def test_an_update_before_begin_is_a_mistake(twin: str) -> None:
    built = Run(twin, runs.spec("adamw"), runs.start(runs.SHAPES))
    with pytest.raises(ValueError, match="begin"):
        built.optimizer.update_all(built._weights, dict(built._weights), 1e-3)


# -- the settings ------------------------------------------------------------------------------------------------------


@by_twin
@pytest.mark.parametrize(
    ("setting", "value", "names"),
    [
        ("beta1", 0.5, ("adamw", "adamw8bit")),
        ("beta2", 0.5, ("adamw", "adamw8bit")),
        ("eps", 1e-2, ("adamw", "adamw8bit")),
        ("momentum", 0.5, ("muon",)),
        ("weight_decay", 0.0, runs.NAMES),
    ],
)
def test_each_setting_changes_the_matrix(twin: str, setting: str, value: float, names: tuple[str, ...]) -> None:
    shapes = {MATRIX: (65, 70)}
    for name in names:
        spec = runs.spec(name)
        changed = OptimizerSpec(**{f: getattr(spec, f) for f in spec.__struct_fields__} | {setting: value})
        usual, other = (
            Run(twin, s, runs.start(shapes)).go(runs.gradients(shapes, 3)).weights[MATRIX] for s in (spec, changed)
        )
        assert not np.array_equal(usual, other)


@by_twin
@by_name
def test_vectors_do_not_decay(twin: str, name: str) -> None:
    start = {"model.norm.weight": np.full(33, 2.0, np.float32), MATRIX: np.full((65, 70), 2.0, np.float32)}
    still = {key: np.zeros_like(value) for key, value in start.items()}
    after = Run(twin, runs.spec(name), start).go([still]).weights
    np.testing.assert_array_equal(after["model.norm.weight"], start["model.norm.weight"])
    np.testing.assert_allclose(after[MATRIX], 2.0 * (1.0 - 0.1 * runs.RATE), rtol=1e-6)


@by_twin
@by_name
def test_a_step_too_small_for_bfloat16_still_moves_the_weights(twin: str, name: str) -> None:
    """At 6e-6 a bfloat16 weight of 1.0 never moves (its neighbours are 0.004 away); a float32 one has to."""
    start = {"model.norm.weight": np.ones(64, np.float32), MATRIX: np.ones((65, 70), np.float32)}
    built = Run(twin, OptimizerSpec(name=name, learning_rate=6e-6, weight_decay=0.0), start)  # type: ignore[arg-type]
    for gradients in runs.gradients(built.shapes, 20):
        built.optimizer.begin()
        built.optimizer.update_all(built._weights, {n: built._array(np.abs(g)) for n, g in gradients.items()}, 6e-6)
    for key, value in built.weights.items():
        moved = float(np.mean(start[key] - value))
        # Muon's step of a matrix of like signs is one rotation: its mean is smaller than the others'.
        assert moved > (1e-6 if name == "muon" else 5e-5), key
        # 8-bit squares that round to 0 let a few weights go further.
        assert np.mean(torch.tensor(value).bfloat16().float().numpy() == 1.0) > 0.99


# -- sizes -------------------------------------------------------------------------------------------------------------


@by_twin
@by_name
def test_the_state_is_as_large_as_planned(twin: str, name: str) -> None:
    built = run(twin, name, runs.SHAPES, 2)
    live = sum(value.nbytes for value in built.optimizer.moments.values())
    assert live == sum(value.nbytes for value in built.state().values())
    assert optimizer_state_bytes(runs.spec(name), runs.SHAPES) == live


@pytest.mark.parametrize(("name", "most"), [("adamw", 8.0), ("adamw8bit", 2.04), ("muon", 4.0), ("adafactor", 0.05)])
def test_bytes_a_parameter_of_a_large_matrix(name: str, most: float) -> None:
    layout = moments.layout(runs.spec(name), "model.layers.0.mlp.up_proj.weight", (1024, 384))
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
    assert size / (1024 * 384) <= most
