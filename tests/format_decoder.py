"""A second decoder, in NumPy, written from `storage/FORMAT.md` alone: it shares no code with the package.

Slow and literal on purpose: bit strings are text, matrices are built in full.
"""

import math

import numpy as np

MULTIPLIER, MEAN, DEVIATION = 0x64B5D79F, 509.9951934814453, 147.82822344516896
SUMS = np.array([sum((x * MULTIPLIER % 2**32).to_bytes(4, "little")) for x in range(2**16)], float)


def bits_of(words: np.ndarray) -> str:
    """Bit string of a row of int32 words."""
    return "".join(f"{int(word) & 0xFFFFFFFF:032b}" for word in words)


def signs(seed: int, side: int, count: int) -> np.ndarray:
    """Section "Incoherence", S_in (side 0) and S_out (side 1)."""
    mask, found = 2**64 - 1, []
    for i in range(count):
        s = (seed ^ side << 63) + (i + 1) * 0x9E3779B97F4A7C15 & mask
        z = (s ^ s >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        found.append(-1.0 if (z ^ z >> 31) >> 63 else 1.0)
    return np.array(found)


def walsh_hadamard(size: int) -> np.ndarray:
    """Orthonormal, Sylvester order."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix / math.sqrt(size)


def cosine(size: int) -> np.ndarray:
    """Orthonormal DCT-II."""
    i, j = np.mgrid[:size, :size]
    return np.sqrt((2 - (i == 0)) / size) * np.cos(np.pi * (2 * j + 1) * i / (2 * size))


def input_rotation(size: int) -> np.ndarray:
    """One block of G."""
    power = size & -size
    odd, primes, divisor = size // power, [], 3
    while odd > 1:
        while odd % divisor == 0:
            primes.append(divisor)
            odd //= divisor
        divisor += 2
    unmixed = math.prod(p for p in primes if p > 1024)
    factors: list[int] = []
    for prime in (p for p in primes if p <= 1024):
        if factors and factors[-1] * prime <= 64:
            factors[-1] *= prime
        else:
            factors.append(prime)
    matrix = np.ones((1, 1))
    for factor in factors:
        matrix = np.kron(matrix, cosine(factor))
    return np.kron(np.kron(matrix, np.eye(unmixed)), walsh_hadamard(power))


def decode_shift(codes: np.ndarray, scale: np.ndarray, k: int) -> np.ndarray:
    """C of section `shift`."""
    matrix = np.zeros((16 * codes.shape[0], 16 * codes.shape[1]))
    for i, j in np.ndindex(codes.shape[:2]):
        string = bits_of(codes[i, j])
        for t in range(256):
            state = int("".join(string[((t + 1) * k - 16 + bit) % (256 * k)] for bit in range(16)), 2)
            row = 16 * i + t // 16
            matrix[row, 16 * j + t % 16] = scale[row] * (SUMS[state] - MEAN) / DEVIATION
    return matrix


def decode_winding(
    codes: np.ndarray,
    centre: np.ndarray,
    shell_side: np.ndarray,
    bits: float,
    options: dict[str, int],
    columns: int,
    group_scale: np.ndarray | None = None,
) -> np.ndarray:
    """C of section `winding`."""
    together = options.get("dimension", 2)
    width, count, points = round(together * bits), -(-columns // together), options["num_points"]
    matrix = np.zeros((len(codes), together * count))
    for r, i in np.ndindex(len(codes), count):
        code = int(bits_of(codes[r])[i * width : (i + 1) * width], 2)
        shell, node = min(code // (points + 1), options["num_shells"]), code % (points + 1)
        for d in range(together):
            turn = (node - 1) * options[f"direction_{d}"] % 2**32 / 2**32 - 0.5 if node else 0.0
            matrix[r, together * i + d] = centre[d] + shell_side[shell] * turn
    matrix = matrix[:, :columns]
    if group_scale is not None:
        matrix = matrix * np.repeat(group_scale, options["group_size"], axis=1)[:, :columns]
    return matrix


def decode_layout(matrix: np.ndarray, mask: np.ndarray | None, shape: tuple[int, ...], fields: dict) -> np.ndarray:
    """The weight of section "Layout", of a scheme with one matrix."""
    if "pruned" not in fields:
        return matrix.reshape(shape)
    pruned, width = fields["pruned"], fields["pruned"]["mask_width"]
    assert mask is not None
    string, weight, place, stored = bits_of(mask), np.zeros(math.prod(shape)), 0, 0
    for i in range(pruned["mask_codes"]):
        number = int(string[i * width : (i + 1) * width], 2)
        place += number
        if number < 2**width - 1:
            weight[place] = matrix.flatten()[stored]
            place, stored = place + 1, stored + 1
    assert stored == pruned["kept"]
    return weight.reshape(shape)


def split_experts(tensors: dict[str, np.ndarray], fields: dict) -> list[dict[str, np.ndarray]]:
    """Tensors of one matrix after the other of a scheme with `experts`, section "Layout"."""
    assert all(len(tensor) == fields["experts"] for tensor in tensors.values())
    return [{name: tensor[e] for name, tensor in tensors.items()} for e in range(fields["experts"])]


def decode_incoherence(
    matrix: np.ndarray, out_scale: np.ndarray, columns: int, seed: int, input_blocks: int
) -> np.ndarray:
    """W of section "Incoherence"."""
    rows_padded, columns_padded = matrix.shape
    block = min(128, rows_padded & -rows_padded)
    left = np.kron(np.eye(rows_padded // block), walsh_hadamard(block)).T
    right = np.kron(np.eye(input_blocks), input_rotation(columns_padded // input_blocks))
    unit = signs(seed, 1, rows_padded)[:, None] * (left @ matrix @ right) * signs(seed, 0, columns_padded)
    return out_scale[:, None] * unit[: len(out_scale), :columns]
