"""Numbers of the C++ standard library's Mersenne twisters, which Megatron's sentence mapping draws from.

Knows `std::mt19937` (numpy has it: legacy `RandomState`, integer seed) and `std::mt19937_64` (numpy has not). Refuses to
know what the numbers are for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 16
_STATE, _HALF = 312, 156
_UPPER = np.uint64(0xFFFFFFFF80000000)
_LOWER = np.uint64(0x7FFFFFFF)
_TWIST = np.uint64(0xB5026F5AA96619E9)
_SEED_FACTOR, _SEED_MASK = 6364136223846793005, (1 << 64) - 1


def draws_32(random: np.random.RandomState) -> Iterator[npt.NDArray[np.uint32]]:
    """Blocks of raw 32-bit numbers without end; of `std::mt19937(seed)` for `RandomState(seed)`."""
    while True:
        yield random.randint(0, 1 << 32, _BLOCK, dtype=np.uint32)


def draws_64(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """uint64[count]: the first numbers of `std::mt19937_64(seed)` (Nishimura and Matsumoto's mt19937-64)."""
    state = _seeded(seed)
    numbers = np.empty((-(-count // _STATE), _STATE), np.uint64)
    for block in numbers:
        _advance(state)
        block[:] = state
    drawn = numbers.reshape(-1)[:count]
    for first in range(0, count, _BLOCK):  # in pieces that stay in the processor's cache
        _temper(drawn[first : first + _BLOCK])
    return drawn


def _seeded(seed: int) -> npt.NDArray[np.uint64]:
    words = [seed & _SEED_MASK]
    for i in range(1, _STATE):
        words.append((_SEED_FACTOR * (words[-1] ^ (words[-1] >> 62)) + i) & _SEED_MASK)
    return np.array(words, np.uint64)


def _advance(state: npt.NDArray[np.uint64]) -> None:
    """The next 312 words in place. Word i needs word i + 1 as it was and word i ± 156, so halves go at once."""
    state[:_HALF] = _twisted(state[:_HALF], state[1 : _HALF + 1]) ^ state[_HALF:]
    state[_HALF:-1] = _twisted(state[_HALF:-1], state[_HALF + 1 :]) ^ state[: _HALF - 1]
    state[-1:] = _twisted(state[-1:], state[:1]) ^ state[_HALF - 1 : _HALF]


def _twisted(upper: npt.NDArray[np.uint64], lower: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = (upper & _UPPER) | (lower & _LOWER)
    return (word >> np.uint64(1)) ^ ((word & np.uint64(1)) * _TWIST)


def _temper(words: npt.NDArray[np.uint64]) -> None:
    words ^= (words >> np.uint64(29)) & np.uint64(0x5555555555555555)
    words ^= (words << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
    words ^= (words << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
    words ^= words >> np.uint64(43)
