"""Compact coding of sorted indices: Rice-coded gaps, or runs where these are shorter.

A mask that keeps each of n entries with probability p needs H(p)/p bits per index on average, and
its gaps are geometric, for which Golomb's code with a power of two (Rice and Plaunt 1971) is
within 0.1 bit of that:

    gap = 2^k q + r:    q zeros and a one,  then r in k bits

All quotients come first, then the remainders as k planes of one bit each, so both directions are a
few array operations. A quotient of `_LIMIT` or more is escaped: one long gap among many short ones
then costs at most 11 bytes. Blocks, rows and whole tensors are runs of adjacent indices, coded by
starts and lengths.

Not supported: adaptive entropy coders, which gain less than the 0.1 bit on random masks.
"""

import math

import numpy as np

_GAPS, _RUNS = 0, 1
_LIMIT = 24
_ESCAPE = np.dtype("<u8")
MOST = 2**62  # indices are below this


def bound(count: int, size: int) -> float:
    """Returns H(p)/p, the bits per index of `count` uniformly random ones, p = count/size."""
    if not 0 < count <= size:
        raise ValueError(f"count={count}, but it should be from 1 to size={size}.")
    p = count / size
    rest = (1 - p) / p * math.log2(1 / (1 - p)) if p < 1 else 0.0
    return math.log2(1 / p) + rest


def encode(indices: np.ndarray, size: int) -> np.ndarray:
    """Encodes indices as bytes.

    Args:
        indices: [k] integers, strictly increasing, from 0 to size - 1.
        size: of the flat tensor.

    Returns:
        [b] uint8; none for no indices.

    Raises:
        ValueError: the indices do not meet these conditions.
    """
    indices = checked(indices, size)
    if not len(indices):
        return np.zeros(0, np.uint8)
    step = np.diff(indices, prepend=-1)
    starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
    code = bytes([_GAPS]) + _rice(step - 1)
    if 2 * len(starts) <= len(indices):
        lengths = np.diff(starts, append=len(indices))
        runs = bytes([_RUNS]) + _rice(step[starts] - 1) + _rice(lengths - 1)
        code = min(code, runs, key=len)
    return np.frombuffer(code, np.uint8)


def decode(code: np.ndarray, size: int, count: int | None = None) -> np.ndarray:
    """Decodes the indices of `encode`, [k] int64.

    Args:
        code: [b] uint8.
        size: of the flat tensor.
        count: expected number of indices; another number is rejected before it is expanded. None:
            any number, up to `size`.

    Raises:
        ValueError: the bytes do not encode `count` indices below `size`.
    """
    code = np.ascontiguousarray(code, np.uint8)
    if not len(code):
        _counted(0, count)
        return np.zeros(0, np.int64)
    gaps, at = _unrice(code, 1, size)
    if code[0] == _GAPS:
        _counted(len(gaps), count)
        indices = np.cumsum(gaps + 1) - 1
    elif code[0] == _RUNS:
        lengths, at = _unrice(code, at, size)
        if len(lengths) != len(gaps) or _sum(lengths) >= size:
            raise ValueError("the lengths of the runs do not fit.")
        lengths += 1
        _counted(int(lengths.sum()), count)
        # Each entry is one more than the last, and a run's first entry also skips its gap.
        step = np.ones(int(lengths.sum()), np.int64)
        step[np.cumsum(lengths) - lengths] += gaps
        indices = np.cumsum(step) - 1
    else:
        raise ValueError(f"there is no coding of kind {code[0]}.")
    if at != len(code):
        raise ValueError(f"there are {len(code)} bytes of indices, but {at} belong to them.")
    if not len(indices) or indices[-1] >= size:
        raise ValueError(f"an index is not below {size}.")
    return indices


def _counted(found: int, count: int | None) -> None:
    if count is not None and found != count:
        raise ValueError(f"the bytes hold {found} indices, not {count}.")


def checked(indices: np.ndarray, size: int) -> np.ndarray:
    """Returns the indices as int64, if they are strictly increasing and from 0 to size - 1."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ValueError(f"indices are {indices.dtype}{list(indices.shape)}, not integers [k].")
    if not 0 <= size <= MOST:
        raise ValueError(f"size={size}, but it should be from 0 to 2^62.")
    indices = indices.astype(np.int64, copy=False)
    if not len(indices):
        return indices
    if indices[0] < 0 or indices[-1] >= size:
        raise ValueError(f"indices from {indices[0]} to {indices[-1]} are not all below {size}.")
    if not (indices[1:] > indices[:-1]).all():
        raise ValueError("the indices are not strictly increasing.")
    return indices


def _rice(numbers: np.ndarray) -> bytes:
    """Encodes numbers [n] >= 0, n > 0."""
    k = _remainder_bits(numbers)
    quotients = numbers >> k
    large = quotients >= _LIMIT
    ends = np.cumsum(np.minimum(quotients, _LIMIT) + 1) - 1
    bits = np.zeros(ends[-1] + 1, np.uint8)
    bits[ends] = 1
    unary = np.packbits(bits, bitorder="little")
    planes = [np.packbits((numbers >> j & 1).astype(np.uint8), bitorder="little") for j in range(k)]
    head = _varint(k) + _varint(len(unary)) + _varint(int(large.sum()))
    parts = (unary, *planes, quotients[large].astype(_ESCAPE))
    return head + b"".join(part.tobytes() for part in parts)


def _remainder_bits(numbers: np.ndarray) -> int:
    """Returns the k with the fewest bits, among those near the median and near the mean."""
    middle = int(np.partition(numbers, len(numbers) // 2)[len(numbers) // 2])
    mean = int(numbers.mean())
    near = {max(0, x.bit_length() + d) for x in (middle, mean) for d in (-2, -1, 0)}

    def bits(k: int) -> int:
        quotients = np.minimum(numbers >> k, _LIMIT)
        escapes = int((quotients == _LIMIT).sum()) * _ESCAPE.itemsize * 8
        return len(numbers) * (k + 1) + int(quotients.sum()) + escapes

    return min(sorted(near), key=bits)


def _unrice(code: np.ndarray, at: int, size: int) -> tuple[np.ndarray, int]:
    """Decodes the sequence that begins at byte `at`; returns its numbers and its end."""
    k, at = _unvarint(code, at)
    width, at = _unvarint(code, at)
    escapes, at = _unvarint(code, at)
    ends = np.flatnonzero(np.unpackbits(code[at : at + width], bitorder="little"))
    count = len(ends)
    plane = -(-count // 8)
    end = at + width + k * plane + escapes * _ESCAPE.itemsize
    if end > len(code) or k >= 63 or not 0 < count <= size:
        raise ValueError("the bytes of the indices end too early, or are others.")
    numbers = np.diff(ends, prepend=-1) - 1
    at += width
    large = np.flatnonzero(numbers == _LIMIT)
    written = code[end - escapes * _ESCAPE.itemsize : end].view(_ESCAPE)
    if len(large) != len(written) or (written >= MOST >> k).any():
        raise ValueError("the large gaps of the indices do not fit.")
    numbers[large] = written.astype(np.int64)
    if _sum(numbers) * 2.0**k > size:  # before the shift, which could overflow
        raise ValueError(f"the gaps add up to more than {size}.")
    numbers <<= k
    for j in range(k):
        bits = np.unpackbits(code[at : at + plane], count=count, bitorder="little")
        numbers |= bits.astype(np.int64) << j
        at += plane
    if _sum(numbers) > size:
        raise ValueError(f"the gaps add up to more than {size}.")
    return numbers, end


def _varint(number: int) -> bytes:
    """Encodes seven bits per byte, the lowest first; the eighth marks that more follow."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _unvarint(code: np.ndarray, at: int) -> tuple[int, int]:
    """Decodes the number that begins at byte `at`; returns it and its end."""
    number = 0
    for i, byte in enumerate(code[at : at + 9].tolist()):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, at + i + 1
    raise ValueError("the bytes of the indices end too early, or are others.")


def _sum(numbers: np.ndarray) -> float:
    """Sums in float64, which cannot overflow."""
    return float(numbers.sum(dtype=np.float64))
