"""Encoding and decoding of `shift` tiles by the compiled core."""

import torch
from torch import Tensor

from hf_hyper._native.library import check, check_multiplier, check_range, require, thread_count
from hf_hyper.errors import ConfigError, ShapeError

_TILE_WEIGHTS = 256


def shift_encode(tiles: Tensor, bits: int, survivor_bits: int, multiplier: int, threads: int | None = None) -> Tensor:
    """Closest circular bit string of `shift`, format 1, for every tile (tail-biting Viterbi).

    Args:
        tiles: `[n, 256]` CPU tensor in units of the observable (unit variance); converted to float32.
        bits: Bits per weight, 1..8.
        survivor_bits: Effort, 8..16: about `2^survivor_bits` evaluations a weight, 16 being the full search.
        multiplier: Odd 32-bit constant of the observable.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[n, 8 * bits]` int32 words.

    Raises:
        ShapeError: `tiles` is not `[n, 256]`.
        ConfigError: An argument lies outside its range, or a weight is NaN or infinite.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    tiles, codes = _prepare_encode(tiles, bits, survivor_bits)
    check_multiplier(multiplier)
    result = library.hyper_shift_encode(
        tiles.data_ptr(), len(tiles), bits, survivor_bits, multiplier, thread_count(threads), codes.data_ptr()
    )
    check(result, "shift_encode")
    return codes


def shift_encode_observable(
    tiles: Tensor, bits: int, survivor_bits: int, byte_sums: Tensor, threads: int | None = None
) -> Tensor:
    """As `shift_encode`, for any observable given as a table; used by searches for a better one.

    Args:
        tiles: `[n, 256]` CPU tensor in units of the observable.
        bits: Bits per weight, 1..8.
        survivor_bits: Effort, 8..16.
        byte_sums: `[65536]` integers in 0..1020, one per state.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Returns:
        `[n, 8 * bits]` int32 words.

    Raises:
        ShapeError: `tiles` is not `[n, 256]` or `byte_sums` not `[65536]`.
        ConfigError: An argument lies outside its range, or a weight is NaN or infinite.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    tiles, codes = _prepare_encode(tiles, bits, survivor_bits)
    if byte_sums.shape != (65536,):
        raise ShapeError(f"byte_sums: got shape {list(byte_sums.shape)}, wanted [65536]")
    sums = byte_sums.to(torch.uint16).contiguous()
    result = library.hyper_shift_encode_observable(
        tiles.data_ptr(), len(tiles), bits, survivor_bits, sums.data_ptr(), thread_count(threads), codes.data_ptr()
    )
    check(result, "shift_encode_observable")
    return codes


def shift_decode(codes: Tensor, bits: int, multiplier: int, threads: int | None = None) -> Tensor:
    """Weights of `shift` tiles, in units of the observable.

    Args:
        codes: `[n, 8 * bits]` int32 CPU tensor.
        bits: Bits per weight, 1..8.
        multiplier: Odd 32-bit constant of the observable.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Returns:
        `[n, 256]` float32.

    Raises:
        ShapeError: `codes` is not `[n, 8 * bits]`.
        ConfigError: An argument lies outside its range.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    check_range("bits", bits, 1, 8)
    check_multiplier(multiplier)
    if codes.ndim != 2 or codes.shape[1] != 8 * bits:
        raise ShapeError(f"codes: got shape {list(codes.shape)}, wanted [n, {8 * bits}] at {bits} bits")
    if codes.dtype != torch.int32 or codes.device.type != "cpu":
        raise ConfigError(f"codes: got {codes.dtype} on {codes.device}, wanted torch.int32 on cpu")
    codes = codes.contiguous()
    tiles = torch.empty(len(codes), _TILE_WEIGHTS, dtype=torch.float32, device="cpu")
    result = library.hyper_shift_decode(
        codes.data_ptr(), len(codes), bits, multiplier, thread_count(threads), tiles.data_ptr()
    )
    check(result, "shift_decode")
    return tiles


def _prepare_encode(tiles: Tensor, bits: int, survivor_bits: int) -> tuple[Tensor, Tensor]:
    check_range("bits", bits, 1, 8)
    check_range("survivor_bits", survivor_bits, 8, 16)
    if tiles.ndim != 2 or tiles.shape[1] != _TILE_WEIGHTS:
        raise ShapeError(f"tiles: got shape {list(tiles.shape)}, wanted [n, {_TILE_WEIGHTS}]")
    if tiles.device.type != "cpu":
        raise ConfigError(f"tiles: got a tensor on {tiles.device}, wanted cpu")
    tiles = tiles.detach().to(torch.float32).contiguous()
    return tiles, torch.empty(len(tiles), 8 * bits, dtype=torch.int32, device="cpu")
