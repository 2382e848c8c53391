"""What `cptv_ao.simulation.fused` launches: Triton kernels over values that lie one after another in memory.

A value's column is that of its channel: channels are last in memory. All of float32 (what `Apart` compares with may be
of bfloat16); sums are written one row a block of rows, and added up outside, so that they are the same in each run.
Products and sums are not contracted (`enable_fp_fusion=False`): each is rounded as the CPU's kernels round it.
"""

import triton
import triton.language as tl


@triton.jit
def round_half_even(value):
    """Of numbers below 2^22, to which the codes of all else are clamped anyway."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def fit(
    x,
    multiplier,
    offset,
    low,
    high,
    codes,
    numel,
    columns,
    BY_COLUMN: tl.constexpr,
    MOVED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes = clamp(round((x + offset) * multiplier), low, high)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(x + at, mask=inside, other=0.0)
    column = at % columns if BY_COLUMN else at * 0
    if MOVED:
        value += tl.load(offset + column, mask=inside, other=0.0)
    value *= tl.load(multiplier + column, mask=inside, other=0.0)
    if ROUNDS:
        value = round_half_even(value)
    value = tl.maximum(tl.minimum(value, tl.load(high)), tl.load(low))  # in this order 0 / 0 is the upper end
    tl.store(codes + at, value, mask=inside)


@triton.jit
def pull(
    gradient,
    x,
    multiplier,
    offset,
    low,
    high,
    factor,
    passed_on,
    sums,
    numel,
    columns,
    BY_COLUMN: tl.constexpr,
    MOVED: tl.constexpr,
    MARGIN: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """passed_on = factor * the gradient where codes are not clipped; sums by column of what passed, of that times u,
    and of what the ends are pulled."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    own = column if BY_COLUMN else column * 0
    scale = tl.load(multiplier + own, mask=known, other=0.0)[None, :]
    moved = tl.load(offset + own, mask=known, other=0.0)[None, :] if MOVED else 0.0
    lower, upper = tl.load(low), tl.load(high) + MARGIN
    if not RELU:
        lower -= MARGIN
    times = tl.load(factor)
    total = tl.zeros([COLUMNS], tl.float32)
    moment = tl.zeros([COLUMNS], tl.float32)
    ends = tl.zeros([COLUMNS], tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * columns + column[None, :]
        inside = known[None, :] & (at < numel)
        pulled = tl.load(gradient + at, mask=inside, other=0.0)
        pulled = tl.where(pulled - pulled == 0.0, pulled, 0.0)  # what is no number says nothing
        u = (tl.load(x + at, mask=inside, other=0.0) + moved) * scale
        below = u < upper
        passes = below & (u > lower)
        passed = tl.where(passes, pulled, 0.0)
        total += tl.sum(passed, 0)
        moment += tl.sum(tl.where(passes, pulled * u, 0.0), 0)
        ends += tl.sum((tl.where(below, pulled, 0.0) if RELU else passed) - pulled, 0)
        tl.store(passed_on + at, passed * times, mask=inside)
    place = sums + tl.program_id(0) * 3 * columns + column
    tl.store(place, total, mask=known)
    tl.store(place + columns, moment, mask=known)
    tl.store(place + 2 * columns, ends, mask=known)


@triton.jit
def add(
    a,
    b,
    factors,
    low,
    high,
    codes,
    numel,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes = clamp(round((fma(a, s_a, l_a) + fma(b, s_b, l_b)) * inverse), low, high); `factors` are these five."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    left = tl.fma(tl.load(a + at, mask=inside, other=0.0), tl.load(factors), tl.load(factors + 1))
    right = tl.fma(tl.load(b + at, mask=inside, other=0.0), tl.load(factors + 2), tl.load(factors + 3))
    u = (left + right) * tl.load(factors + 4)
    if ROUNDS:
        u = round_half_even(u)
    tl.store(codes + at, tl.minimum(tl.maximum(u, tl.load(low)), tl.load(high)), mask=inside)


@triton.jit
def pull_add(
    gradient,
    a,
    b,
    factors,
    low,
    high,
    d_a,
    d_b,
    sums,
    numel,
    MARGIN: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """The gradients of a and b; sums of what passed times u and times a, and of what the ends are pulled."""
    a_scale, a_lost, b_scale, b_lost = (
        tl.load(factors),
        tl.load(factors + 1),
        tl.load(factors + 2),
        tl.load(factors + 3),
    )
    inverse = tl.load(factors + 4)
    lower, upper = tl.load(low), tl.load(high) + MARGIN
    if not RELU:
        lower -= MARGIN
    moment = tl.zeros([BLOCK], tl.float32)
    left = tl.zeros([BLOCK], tl.float32)
    ends = tl.zeros([BLOCK], tl.float32)
    for turn in range(TURNS):
        at = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        pulled = tl.load(gradient + at, mask=inside, other=0.0)
        value = tl.load(a + at, mask=inside, other=0.0)
        other = tl.load(b + at, mask=inside, other=0.0)
        u = (tl.fma(value, a_scale, a_lost) + tl.fma(other, b_scale, b_lost)) * inverse
        below = u < upper
        passed = tl.where(below & (u > lower), pulled, 0.0)
        moment += passed * u
        left += passed * value
        ends += (tl.where(below, pulled, 0.0) if RELU else passed) - pulled
        tl.store(d_a + at, passed * (a_scale * inverse), mask=inside)
        tl.store(d_b + at, passed * (b_scale * inverse), mask=inside)
    place = sums + tl.program_id(0) * 3
    tl.store(place, tl.sum(moment, 0))
    tl.store(place + 1, tl.sum(left, 0))
    tl.store(place + 2, tl.sum(ends, 0))


@triton.jit
def apart(
    a,
    b,
    weight,
    ratio,
    factor,
    result,
    sums,
    numel,
    columns,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Of d = a - ratio b: sums of weight d^2, or, backward, of weight d a, with factor * weight d as the result."""
    scale = tl.load(ratio)
    times = tl.load(factor) if BACKWARD else 0.0
    total = tl.zeros([BLOCK], tl.float32)
    for turn in range(TURNS):
        at = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        value = tl.load(a + at, mask=inside, other=0.0)
        difference = value - tl.load(b + at, mask=inside, other=0.0).to(tl.float32) * scale
        weighted = difference * tl.load(weight + at % columns, mask=inside, other=0.0)
        total += weighted * (value if BACKWARD else difference)
        if BACKWARD:
            tl.store(result + at, weighted * times, mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
