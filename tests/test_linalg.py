"""Decompositions against numpy's float64 SVD."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from core_fixtures import largest_principal_angle, relative_error

from lorainit_diffusers import linalg
from lorainit_diffusers.linalg import (
    ANGLE_TOLERANCE,
    CHUNK_ROWS,
    MAX_EXACT_SIZE,
    column_limit,
    eigh_descending,
    is_exact,
    krylov_eigenpairs,
    leading_eigenpairs,
    operator_svd,
    product_svd,
    times,
    top_svd,
    transposed_times,
)

CPU = torch.device("cpu")


def matrix_with_values(rows: int, columns: int, values: np.ndarray, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return torch.from_numpy(left * values @ right.T)


def assert_orthonormal(rows: torch.Tensor, tolerance: float) -> None:
    assert float((rows @ rows.mT - torch.eye(rows.shape[0], dtype=rows.dtype)).abs().max()) < tolerance


def test_eigh_reconstructs_in_descending_order():
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = rows.mT @ rows
    values, vectors = eigh_descending(matrix)
    assert (values.diff() <= 0).all()
    assert relative_error(vectors * values @ vectors.mT, matrix) < 1e-12
    assert_orthonormal(vectors.mT, 1e-12)


def test_eigh_of_a_singular_matrix_has_no_negative_value():
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    values, vectors = eigh_descending(rows.mT @ rows)
    assert (values >= 0).all()
    assert_orthonormal(vectors.mT, 1e-6)


def test_eigh_averages_an_asymmetric_accumulator():
    matrix = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    matrix[0, 1] = 0.2  # as [[3, .1], [.1, 1]]
    expected = np.linalg.eigvalsh(np.array([[3.0, 0.1], [0.1, 1.0]]))[::-1]
    np.testing.assert_allclose(eigh_descending(matrix).values.numpy(), expected, rtol=1e-12)


# Full decompositions (the first four), and Krylov spaces of rectangular and nearly square matrices.
@pytest.mark.parametrize(
    ("rows", "columns", "tolerance"),
    [
        (20, 20, 1e-7),
        (60, 17, 1e-7),
        (17, 60, 1e-7),
        (300, 1000, 1e-4),
        (500, 1000, 1e-4),
        (1000, 500, 1e-4),
        (600, 640, 1e-4),
    ],
)
def test_top_svd_agrees_with_numpy(rows, columns, tolerance):
    values = np.geomspace(10.0, 0.01, min(rows, columns))
    if min(rows, columns) > 100:
        values = 10.0 * 0.9 ** np.arange(min(rows, columns))
    matrix = matrix_with_values(rows, columns, values)
    left, singular, right = top_svd(matrix, 6)
    reference = np.linalg.svd(matrix.numpy(), full_matrices=False)
    assert left.shape == (rows, 6)
    assert singular.shape == (6,)
    assert right.shape == (6, columns)
    np.testing.assert_allclose(singular.double().numpy(), reference.S[:6], rtol=tolerance)
    assert largest_principal_angle(left.mT, torch.from_numpy(reference.U[:, :6].T.copy())) < 10 * tolerance
    assert largest_principal_angle(right, torch.from_numpy(reference.Vh[:6])) < 10 * tolerance
    # The triplets belong together, signs included.
    best = torch.from_numpy(reference.U[:, :6] * reference.S[:6] @ reference.Vh[:6])
    assert relative_error(left * singular @ right, best) < 10 * tolerance


SIZE = 560
SPECTRA = {
    "flat": None,  # of a random matrix: neighbouring values differ by less than a percent
    "steep": np.arange(1.0, SIZE + 1) ** -1.5,
    "a mean far ahead": np.concatenate([[300.0], np.linspace(1.0, 0.1, SIZE - 1)]),
    "rank-deficient": np.where(np.arange(SIZE) < 40, np.linspace(2.0, 1.0, SIZE), 0.0),
    "steps": np.repeat(np.arange(SIZE // 8, 0.0, -1.0), 8),  # every value eight times
}


def psd_matrix(name: str) -> torch.Tensor:
    values = SPECTRA[name]
    if values is None:
        rows = torch.randn(2 * SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return rows.mT @ rows / len(rows)
    basis = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, SIZE)))[0])
    return basis * torch.from_numpy(values) @ basis.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_eigenpairs_of_any_spectrum(name, dtype):
    matrix = psd_matrix(name)
    assert not is_exact(SIZE, 8)
    given = matrix.to(dtype)
    found = leading_eigenpairs(partial(times, given), SIZE, 8, device=given.device, with_trace=True)
    values, vectors = np.linalg.eigh(matrix.numpy())
    assert found.vectors.dtype == torch.float64
    np.testing.assert_allclose(found.values.numpy(), values[::-1][:8], rtol=1e-5)
    assert_orthonormal(found.vectors.mT, 1e-10)
    assert largest_principal_angle(found.vectors.mT, torch.from_numpy(vectors[:, ::-1][:, :8].T.copy())) < 1e-3
    # the stated standard error is sqrt(2 / (16 size)), and this is one draw
    assert found.trace == pytest.approx(float(matrix.trace()), rel=3 * (2 / (16 * SIZE)) ** 0.5)


def test_a_subspace_that_is_not_determined_still_holds_its_share_of_the_trace():
    found = krylov_eigenpairs(lambda block: block, SIZE, 8, device=CPU, with_trace=True)
    assert found is not None
    np.testing.assert_allclose(found.values.numpy(), np.ones(8), rtol=1e-5)
    assert_orthonormal(found.vectors.mT, 1e-5)
    assert found.trace == pytest.approx(SIZE, rel=0.05)


def test_a_space_that_is_too_small_says_so_instead_of_being_wrong():
    operator = partial(times, psd_matrix("flat").float())
    assert krylov_eigenpairs(operator, SIZE, 8, device=CPU, max_columns=64) is None


def test_a_good_start_saves_products():
    matrix = psd_matrix("steep")
    start = torch.linalg.eigh(matrix).eigenvectors[:, -8:]
    calls = {}
    for name, given in (("with", start), ("without", None)):
        products: list[int] = []

        def operator(block: torch.Tensor, products: list[int] = products) -> torch.Tensor:
            products.append(block.shape[1])
            return times(matrix, block)

        assert krylov_eigenpairs(operator, SIZE, 8, device=CPU, start=given) is not None
        calls[name] = sum(products)
    assert calls["with"] < calls["without"]


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (420, 800), (800, 420)])
def test_svd_of_a_flat_spectrum_is_not_approximate(shape):
    """Power iterations stop anywhere in such a spectrum: 4 to 16 % off, by measurement."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, singular, right = top_svd(matrix, 8)
    reference = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = reference.U[:, :8] * reference.S[:8] @ reference.Vh[:8]
    assert relative_error(left * singular @ right, best) < 1e-3


def test_svd_of_a_large_rank_is_exact():
    matrix = torch.randn(500, 520, generator=torch.Generator().manual_seed(0))
    left, singular, right = top_svd(matrix, 128)
    reference = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = reference.U[:, :128] * reference.S[:128] @ reference.Vh[:128]
    assert relative_error(left * singular @ right, best) < 1e-5


def test_a_random_start_neither_reads_nor_moves_the_global_generator():
    size = MAX_EXACT_SIZE + 8
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = top_svd(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(top_svd(matrix, 4).right, first.right)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("true_rank", [0, 2])
def test_top_svd_completes_the_basis_of_a_rank_deficient_matrix(shape, true_rank):
    values = np.array([3.0, 2.0])[:true_rank]
    matrix = matrix_with_values(*shape, values) if true_rank else torch.zeros(shape, dtype=torch.float64)
    left, singular, right = top_svd(matrix, 5)
    assert_orthonormal(left.mT, 1e-7)
    assert_orthonormal(right, 1e-7)
    np.testing.assert_allclose(singular[:true_rank].numpy(), values, rtol=1e-9)
    assert float(singular[true_rank:].abs().sum()) < 1e-6
    assert float((left * singular @ right - matrix).abs().max()) < 1e-6


@pytest.mark.parametrize("true_rank", [0, 2, 4])
def test_the_svd_of_a_product_is_that_of_the_matrix(true_rank):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    left[:, true_rank:] = 0
    right = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    found = product_svd(left, right)
    np.testing.assert_allclose(found.values.numpy(), torch.linalg.svdvals(left @ right)[:4].numpy(), atol=1e-12)
    assert_orthonormal(found.left.mT, 1e-12)
    assert_orthonormal(found.right, 1e-12)
    assert float((found.left * found.values @ found.right - left @ right).abs().max()) < 1e-12


@pytest.mark.parametrize("num_rows", [5, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_products_are_in_the_precision_of_the_columns(num_rows, dtypes):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(num_rows, 7, generator=generator, dtype=dtypes[0])
    for dtype, tolerance in ((dtypes[0], 1e-6), (dtypes[1], 1e-12 if dtypes[1] == torch.float64 else 1e-6)):
        block = torch.randn(7, 3, generator=generator, dtype=dtype)
        back = torch.randn(num_rows, 3, generator=generator, dtype=dtype)
        assert times(matrix, block).dtype == transposed_times(matrix, back).dtype == dtype
        assert relative_error(times(matrix, block), matrix.double() @ block.double()) < tolerance
        assert relative_error(transposed_times(matrix, back), matrix.double().mT @ back.double()) < tolerance


def counted(matrix: torch.Tensor, noise: float = 0.0) -> tuple[linalg.Operator, list[torch.dtype]]:
    """Products with a matrix, those in float32 off by a fixed error; and in which precisions they were asked for."""
    dtypes: list[torch.dtype] = []
    error = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wrong = matrix + noise * (error + error.mT) / len(matrix) ** 0.5

    def operator(block: torch.Tensor) -> torch.Tensor:
        dtypes.append(block.dtype)
        return times(wrong if block.dtype == torch.float32 else matrix, block)

    return operator, dtypes


def angle_to_the_leading(found: linalg.Leading, matrix: torch.Tensor) -> float:
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, -found.vectors.shape[1] :]
    return largest_principal_angle(found.vectors.mT, vectors.mT)


def test_float64_is_asked_where_float32_cannot_be_sure_and_nowhere_else():
    easy = psd_matrix("steep")
    hard = easy + 1e4 * torch.ones(SIZE, SIZE) / SIZE  # one value far ahead
    for matrix, delicate, asked in ((easy, False, False), (easy, True, True), (hard, False, True)):
        operator, dtypes = counted(matrix)
        found = krylov_eigenpairs(operator, SIZE, 8, device=CPU, delicate=delicate)
        assert found is not None
        assert (torch.float64 in dtypes) == asked
        assert angle_to_the_leading(found, matrix) < ANGLE_TOLERANCE


def test_what_poor_float32_products_miss_is_made_good_in_float64():
    matrix = psd_matrix("steep")
    operator, dtypes = counted(matrix, noise=1e-4)
    found = krylov_eigenpairs(operator, SIZE, 8, device=CPU, delicate=True)
    assert found is not None
    assert angle_to_the_leading(found, matrix) < ANGLE_TOLERANCE
    trusting = krylov_eigenpairs(operator, SIZE, 8, device=CPU)
    assert trusting is not None
    assert angle_to_the_leading(trusting, matrix) > ANGLE_TOLERANCE  # so there was something to make good
    assert dtypes.count(torch.float64) > 1


def test_a_spectrum_too_flat_for_a_krylov_space_is_decomposed_in_full(monkeypatch):
    matrix = psd_matrix("flat")
    monkeypatch.setattr(linalg, "krylov_eigenpairs", lambda *_args, **_keywords: None)
    found = leading_eigenpairs(partial(times, matrix), SIZE, 8, device=CPU)
    assert angle_to_the_leading(found, matrix) < 1e-9
    assert found.trace == pytest.approx(float(matrix.trace()), rel=1e-9)
    assert relative_error(top_svd(matrix, 8).values, torch.linalg.svdvals(matrix)[:8]) < 1e-9


@pytest.mark.parametrize("shape", [(300, 500), (700, 300), (900, 280), (40, 60)])
@pytest.mark.parametrize("rank", [8, 40])
def test_the_svd_of_an_operator_is_that_of_the_matrix(shape, rank):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    svd, squared_norm = operator_svd(
        partial(times, matrix), partial(transposed_times, matrix), shape, rank, device=CPU, with_norm=True
    )
    reference = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = reference.U[:, :rank] * reference.S[:rank] @ reference.Vh[:rank]
    assert relative_error(svd.left * svd.values @ svd.right, best) < 1e-3
    assert squared_norm == pytest.approx(float(matrix.square().sum()), rel=0.03)


def test_a_space_for_a_tall_matrix_may_hold_its_whole_rank():
    assert column_limit(640, 640) == 320
    assert column_limit(320, 640) == 160
    assert column_limit(640, 320) == 160
    assert column_limit(900, 280) >= 280


def test_directions_do_not_depend_on_the_number_of_threads():
    """Stated tolerance: that of the angle; rounding differs, and with it, rarely, the number of steps."""
    matrix = torch.randn(700, 640, generator=torch.Generator().manual_seed(4))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(top_svd(matrix, 8))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert largest_principal_angle(other.right, found[0].right) < ANGLE_TOLERANCE
        assert largest_principal_angle(other.left.mT, found[0].left.mT) < ANGLE_TOLERANCE
