"""The polar factor: the facts of the paper, any matrix on one process, and shared ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_nemo.callbacks import polar
from megacpp_nemo.callbacks.polar import defect, deviation, newton_schulz, polar_
from megacpp_nemo.callbacks.polynomials import polynomial
from megacpp_nemo.callbacks.symmetric import Symmetric
from megacpp_nemo.contract.errors import RuntimeRefusal
from tests.callbacks.memory import largest_bytes, peak_bytes
from tests.support.processes import in_processes

EXACT = 1e-12  # a tolerance that leaves only rounding, in fp64


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """An entry that is used and was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(height: int, values: Tensor, seed: int = 0) -> Tensor:
    """Return a matrix `[height, number of values]` in fp64."""
    left, _, right = torch.linalg.svd(
        normal(height, len(values), seed=seed, dtype=torch.float64), full_matrices=False
    )
    return left * values.double() @ right


def factor_of(matrix: Tensor) -> Tensor:
    """Return the polar factor by singular value decomposition, in fp64."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ right


def off(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


# The reference.


@pytest.mark.parametrize(
    ("shape", "deviations", "spread"),
    [
        # The smallest of 64 singular values differs much from draw to draw, and late deviations
        # are little else.
        ((64, 64), {5: 0.413, 10: 0.063, 15: 0.016}, {5: 0.02, 10: 0.02, 15: 0.015}),
        ((768, 768), {5: 0.870, 10: 0.193, 15: 0.026, 20: 0.004}, {20: 2e-3}),
        ((3072, 768), {5: 0.863, 10: 0.011}, {}),
    ],
    ids=str,
)
def test_the_papers_iterations_do_not_reach_isometry_at_width(shape, deviations, spread):
    x, done = normal(*shape), 0
    for iterations, expected in deviations.items():
        x = newton_schulz(x, iterations) if not done else continued(x, iterations - done)
        done = iterations
        assert defect(x.t() @ x) == pytest.approx(expected, abs=spread.get(iterations, 1e-3))


def continued(x: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.t() @ x)
    return x


@pytest.mark.parametrize(("iterations", "value"), [(1, 0.1495), (5, 0.658719), (10, 1.0)])
def test_the_papers_map_of_a_singular_value(iterations, value):
    matrix = torch.tensor([0.1, math.sqrt(0.99)], dtype=torch.float64).diag()
    mapped = newton_schulz(matrix, iterations)
    assert float(mapped[0, 0]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("iterations", "least", "most"), [(5, 2.36, 2.40), (10, 3e-6, 2e-5), (15, 0, 2e-14)]
)
def test_the_papers_iterations_of_a_tall_matrix_in_fp64(iterations, least, most):
    """2.37, 1.5e-5 and 1.6e-14 on one draw."""
    matrix = normal(256, 64, dtype=torch.float64)
    error = float((newton_schulz(matrix, iterations) - factor_of(matrix)).norm())
    assert least <= error <= most
    transposed = newton_schulz(matrix.t(), iterations)
    assert torch.equal(transposed, newton_schulz(matrix, iterations).t())


# Its parts.


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("low", [1e-7, 1e-3, 0.02, 0.1, 0.3, 0.7, 0.95, 0.985, 0.995, 1.0])
def test_a_polynomial_keeps_singular_values_above_0_and_at_most_1(low, degree):
    a, b, c = polynomial(low, degree)
    x = torch.linspace(1e-6, 1, 20_001, dtype=torch.float64)
    y = a * x + b * x**3 + c * x**5
    assert float(y.max()) <= 1 + 1e-15
    assert float(y.min()) > 0
    # And brings them nearer to 1 than the paper's does.
    papers = 1.5 * low - 0.5 * low**3
    assert float(y[x >= low].min()) >= min(papers, 0.05)


def test_of_degree_3_both_ends_are_as_far_from_1():
    a, b, _ = polynomial(0.3, 3)
    assert a * 0.3 + b * 0.3**3 == pytest.approx(a + b)


def test_of_degree_5_the_error_is_the_same_at_four_points():
    a, b, c = polynomial(0.1, 5)
    x = torch.linspace(0.1, 1, 200_001, dtype=torch.float64)
    y = a * x + b * x**3 + c * x**5
    inner = [float(y[x < 0.5].max()), float(y[x > 0.5].min())]
    assert inner == pytest.approx([float(y[-1]), float(y[0])])


@pytest.mark.parametrize("size", [1, 5, 257, 1027], ids="blocks_of_{}".format)
def test_a_symmetric_matrix_by_blocks_is_the_matrix(size):
    matrix = normal(3, size, dtype=torch.float64)
    dense = matrix.t() @ matrix + torch.eye(size)
    kept = Symmetric(size, like=matrix).gram_(matrix).add_diagonal_(1.0)
    assert size < 2000 / 3 or kept.flat.numel() < 0.63 * size**2
    eye = torch.eye(size, dtype=torch.float64)
    for found, expected in ((kept, dense), (kept.square(), dense @ dense)):
        torch.testing.assert_close(found.multiply(eye, torch.empty_like(eye)), expected)
    assert kept.deviation(0.5) == pytest.approx(defect(0.5 * dense))
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    rows = float(dense.abs().sum(1).max())
    assert kept.largest() == pytest.approx(min(rows, float(dense.norm())))
    assert kept.largest() >= largest


# On one process.

SHAPES = [(1, 1), (1, 7), (7, 1), (64, 64), (96, 32), (32, 96), (200, 128), (256, 30)]
LARGER = [(300, 300), (700, 300), (300, 700), (1030, 1100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_matrices_become_their_polar_factor(shape):
    matrix = normal(*shape)
    found = matrix.clone()
    outcome = polar_(found, shape=shape, tolerance=EXACT)
    assert outcome.reached
    assert off(found, factor_of(matrix)) < 1e-6


@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_larger_matrices_become_it_within_the_rounding_of_fp32(shape):
    matrix = normal(*shape)
    found = matrix.clone()
    outcome = polar_(found, shape=shape, tolerance=1e-9)
    assert outcome.reached
    # 2e-6 and up to 1e-4 where the smallest singular value is near the tolerance.
    assert off(found, factor_of(matrix)) < 3e-4


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("shape", [(64, 64), (300, 700)], ids=str)
def test_it_stops_at_the_tolerance_and_says_what_it_reached(shape, tolerance):
    matrix = normal(*shape)
    found = matrix.clone()
    outcome = polar_(found, shape=shape, tolerance=tolerance)
    tall = found if shape[0] >= shape[1] else found.t()
    assert outcome.after == pytest.approx(defect(tall.t() @ tall), rel=1e-2, abs=1e-9)
    assert outcome.after <= tolerance
    before = matrix if shape[0] >= shape[1] else matrix.t()
    assert outcome.before == pytest.approx(defect(before.t() @ before), rel=1e-5)
    fewer = matrix.clone()
    cut = polar_(fewer, shape=shape, tolerance=tolerance, max_iterations=outcome.iterations - 1)
    assert not cut.reached
    assert cut.iterations == outcome.iterations - 1
    assert cut.after > tolerance


def test_what_is_an_isometry_already_is_left_bit_for_bit():
    matrix = normal(400, 300)
    polar_(matrix, shape=(400, 300))
    again = matrix.clone()
    outcome = polar_(again, shape=(400, 300))
    assert (outcome.iterations, outcome.reached) == (0, True)
    assert torch.equal(again, matrix)


@pytest.mark.parametrize("shape", [(64, 48), (300, 300)], ids=str)
@pytest.mark.parametrize("power", [-110, 100])
def test_the_scale_of_a_matrix_does_not_matter(shape, power):
    """A power of two changes no bit of what follows; squares of these leave fp32."""
    matrix = normal(*shape)
    expected = matrix.clone()
    polar_(expected, shape=shape)
    matrix.mul_(2.0**power)
    polar_(matrix, shape=shape)
    assert torch.equal(matrix, expected)


def test_the_sum_of_squared_changes_is_that_of_singular_values_to_1():
    matrix = normal(48, 32, dtype=torch.float64).float()
    found = matrix.clone()
    polar_(found, shape=(48, 32), tolerance=EXACT)
    values = torch.linalg.svdvals(matrix.double())
    assert float((found - matrix).square().sum()) == pytest.approx(
        float((values - 1).square().sum()), rel=1e-5
    )
    assert float(found.square().sum()) == pytest.approx(32, rel=1e-5)


@pytest.mark.parametrize(("height", "width"), [(300, 300), (1200, 300), (64, 64), (256, 64)])
def test_it_takes_far_fewer_iterations_than_the_papers(height, width):
    matrix = normal(height, width)
    outcome = polar_(matrix.clone(), shape=(height, width))
    papers = newton_schulz(matrix, 2 * outcome.iterations - 1)
    assert defect(papers.t() @ papers) > 1e-6


@pytest.mark.parametrize("height", [300, 1200])
@pytest.mark.parametrize("decades", [3, 6, 9, 30])
def test_no_singular_value_runs_away(height, decades):
    """Also where the smallest are lost in fp32, and every polynomial is the steepest."""
    values = torch.logspace(0, -decades, 300, dtype=torch.float64)
    found = with_singular_values(height, values).float()
    outcome = polar_(found, shape=(height, 300))
    after = torch.linalg.svdvals(found.double())
    assert float(after[0]) < 1 + 1e-5
    assert outcome.reached == (decades <= 6)
    assert float((after > 0.999).sum()) >= 299 * min(1, 6 / decades)


def test_a_matrix_without_full_rank_becomes_a_partial_isometry_and_says_so():
    for size in (64, 300):
        matrix = normal(size, size)
        matrix[:, ::2] = 0
        found = matrix.clone()
        outcome = polar_(found, shape=(size, size))
        assert not outcome.reached
        assert outcome.after == pytest.approx(0.5, abs=1e-5)
        assert not found[:, ::2].any()
        assert off(found[:, 1::2], factor_of(matrix[:, 1::2])) < 1e-4


def test_all_zeros_stay():
    zeros = torch.zeros(12, 8)
    outcome = polar_(zeros, shape=(12, 8))
    assert outcome == (0, False, 1.0, 1.0)
    assert not zeros.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_is_refused_and_nothing_written(value):
    matrix = normal(40, 30)
    matrix[3, 4] = value
    before = matrix.clone()
    with pytest.raises(RuntimeRefusal, match="not finite"):
        polar_(matrix, shape=(40, 30))
    assert torch.equal(matrix.nan_to_num(), before.nan_to_num())


def test_products_are_in_full_fp32_whatever_is_set():
    matrix = normal(700, 300)
    expected = matrix.clone()
    polar_(expected, shape=(700, 300))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            polar_(matrix, shape=(700, 300))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("shape", [(600, 600), (1100, 1100), (600, 1200), (2400, 600)], ids=str)
def test_beside_a_matrix_it_takes_less_memory_than_another_one(shape):
    matrix = normal(*shape)
    size = 4 * matrix.numel()
    assert peak_bytes(lambda: polar_(matrix, shape=shape, max_iterations=2)) <= 1.01 * size


# On two processes.

SPLITS: list[tuple[tuple[int, int], int, int]] = [
    # Shape, dimension that is split, and how much of it the first rank has.
    *(((48, 48), split, 24) for split in (0, 1)),
    *(((64, 32), split, 16 * (2 - split)) for split in (0, 1)),
    *(((32, 64), split, 16 * (1 + split)) for split in (0, 1)),
    ((24, 32), 0, 20),
    ((8, 32), 0, 0),
    ((33, 20), 0, 33),
    ((20, 33), 1, 1),
    ((1, 32), 0, 1),
    *(((300, 300), split, 150) for split in (0, 1)),
    *(((320, 700), split, 100) for split in (0, 1)),
]


def share_of(matrix: Tensor, split: int, first: int, rank: int) -> Tensor:
    return matrix.split([first, matrix.size(split) - first], split)[rank].clone()


@pytest.mark.two_process
def test_a_shared_matrix_becomes_what_it_does_unshared():
    def run() -> list[Any]:
        torch.distributed.init_process_group("gloo")
        rank, results = torch.distributed.get_rank(), []
        for number, (shape, split, first) in enumerate(SPLITS):
            share = share_of(normal(*shape, seed=number), split, first, rank)
            before = deviation(share.clone(), shape=shape, split=split)
            outcome = polar_(share, shape=shape, split=split, tolerance=1e-8)
            results.append((share.tolist(), tuple(outcome), before))
        torch.distributed.destroy_process_group()
        return results

    ranks = in_processes(run, ranks=2)
    for number, (shape, split, first) in enumerate(SPLITS):
        matrix = normal(*shape, seed=number)
        before = deviation(matrix.clone(), shape=shape)
        outcome = polar_(matrix, shape=shape, tolerance=1e-8)
        for rank, results in enumerate(ranks):
            share, found, found_before = results[number]
            expected = share_of(matrix, split, first, rank)
            # fp32 beyond 256; below, rounding is that of the result.
            most = 2e-7 if min(shape) <= polar.DOUBLE_UP_TO else 2e-5
            actual = torch.tensor(share).view(expected.shape)
            torch.testing.assert_close(actual, expected, rtol=0, atol=most)
            assert found[:2] == outcome[:2]
            assert found[2:] == pytest.approx(outcome[2:], rel=1e-3, abs=1e-9)
            assert found_before == pytest.approx(before, rel=1e-5)


@pytest.mark.two_process
def test_no_rank_holds_a_whole_matrix():
    def run() -> list[float]:
        torch.distributed.init_process_group("gloo")
        rank, largest = torch.distributed.get_rank(), []
        for shape, split in (((1600, 400), 0), ((400, 1600), 0), ((600, 600), 1)):
            share = share_of(normal(*shape), split, shape[split] // 2, rank)
            whole = 4 * shape[0] * shape[1]
            work = functools.partial(polar_, share, shape=shape, split=split)
            largest.append(largest_bytes(work) / whole)
        return largest

    for along, across, square in in_processes(run, ranks=2):
        assert along <= 0.25
        assert across <= 0.5
        assert square <= 0.75  # the Gram matrix of the short side, by blocks


@pytest.mark.two_process
def test_an_entry_that_is_not_finite_on_one_rank_is_refused_on_both():
    def run() -> bool:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        share = normal(20, 30, seed=rank)
        if rank:
            share[0, 0] = math.nan
        before = share.clone()
        with pytest.raises(RuntimeRefusal, match="not finite"):
            polar_(share, shape=(40, 30), split=0)
        return torch.equal(share.nan_to_num(), before.nan_to_num())

    assert in_processes(run, ranks=2) == [True, True]


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (torch.zeros(2, 3, 4), (2, 3, 4)),
        (torch.zeros(4), (4,)),
        (torch.zeros(4, 3), (3, 4)),
        (torch.zeros(4, 3, dtype=torch.bfloat16), (4, 3)),
    ],
    ids=["three dimensions", "one", "another shape", "bf16"],
)
def test_what_is_no_matrix_is_refused(tensor, shape):
    with pytest.raises(RuntimeRefusal, match="Only a matrix has a polar factor"):
        polar_(tensor, shape=shape)
