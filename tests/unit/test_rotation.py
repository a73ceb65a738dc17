import pytest
import torch

from hf_hyper.rotation.hadamard import dct_matrix, hadamard, odd_factors, rotate, unrotate
from hf_hyper.rotation.incoherence import (
    output_block,
    rotate_input,
    rotate_output,
    rotate_weight,
    signs,
    unrotate_output,
    unrotate_weight,
)
from hf_hyper.scheme import TensorScheme

WIDTHS = [16, 48, 176, 576, 1536, 29568, 16 * 1031]


def splitmix64(state: int, count: int) -> list[int]:
    """The published recurrence in Python integers: the oracle for the tensor version."""
    mask, outputs = (1 << 64) - 1, []
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        outputs.append(z ^ z >> 31)
    return outputs


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("side", [0, 1])
def test_signs_are_the_top_bits_of_splitmix64(seed: int, side: int) -> None:
    wanted = [-1.0 if z >> 63 else 1.0 for z in splitmix64(seed ^ side << 63, 100)]
    assert signs(seed, side, 100).tolist() == wanted


def test_splitmix64_oracle_matches_the_published_outputs() -> None:
    # First outputs for seed 1234567, as printed by the reference C code of Vigna.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_keeps_lengths_and_inverts(width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64)
    assert torch.allclose(rotate(x).norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(unrotate(rotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("width", [16, 48, 176, 576])
def test_rotation_mixes_every_input_into_every_output(width: int) -> None:
    matrix = rotate(torch.eye(width))
    assert torch.allclose(matrix @ matrix.T, torch.eye(width), atol=1e-5)
    # DCT entries reach sqrt(2 / m) for each odd factor m; a few are exactly zero in the middle of a cosine.
    assert matrix.abs().max() <= 2 ** (len(odd_factors(width)) / 2) * width**-0.5 * (1 + 1e-5)
    assert (matrix.abs() > 1e-6).float().mean() > 0.85


def test_hadamard_is_the_sylvester_matrix() -> None:
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert torch.allclose(hadamard(torch.eye(8)), torch.kron(torch.kron(h2, h2), h2) / 8**0.5)


@pytest.mark.parametrize("size", [3, 9, 43, 1021])
def test_dct_is_orthonormal(size: int) -> None:
    assert torch.allclose(dct_matrix(size) @ dct_matrix(size).T, torch.eye(size), atol=1e-5)


@pytest.mark.parametrize(
    ("width", "factors"), [(576, (9,)), (29568, (21, 11)), (16 * 67 * 3, (3, 67)), (16 * 1031, ())]
)
def test_odd_factors(width: int, factors: tuple[int, ...]) -> None:
    assert odd_factors(width) == factors


@pytest.mark.parametrize(
    ("rows", "columns", "blocks"), [(576, 1536, 1), (576, 1536, 4), (172, 64, 1), (1, 1, 1), (200, 33, 3)]
)
def test_weight_rotation_commutes_with_the_product(rows: int, columns: int, blocks: int) -> None:
    scheme = TensorScheme("shift", 4, rows, columns, input_blocks=blocks, seed=7)
    weight, x = torch.randn(rows, columns), torch.randn(5, columns)
    rotated = rotate_weight(weight, scheme)
    assert rotated.shape == (scheme.padded_out, scheme.padded_in)
    assert torch.allclose(unrotate_weight(rotated, scheme), weight, atol=1e-5)
    y = unrotate_output(rotate_input(x, scheme) @ rotated.T, scheme)
    assert torch.allclose(y, x @ weight.T, atol=1e-3 * columns**0.5)
    assert torch.allclose(unrotate_output(rotate_output(y, scheme), scheme), y, atol=1e-3)


@pytest.mark.parametrize(("rows", "block"), [(576, 64), (1536, 128), (172, 16), (1, 16), (4096, 128)])
def test_output_blocks_are_powers_of_two_up_to_128(rows: int, block: int) -> None:
    assert output_block(TensorScheme("shift", 4, rows, 64)) == block
