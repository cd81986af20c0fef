"""Triton kernels of the pairwise forms (docs/estimators/fused.md).

One program is one warp. It owns strips of ``BD`` neighbouring diagonals ``d = i - j`` of one stream
and marches down the rows: lane ``x`` holds the recurrence of diagonal ``d0 + x`` in registers, so
no state ever crosses lanes. WINDOWED evidence follows the recurrences that head
`cuda/kernels/diagonals.cuh`. Streams are ``[H, T, M]`` in float32 with T padded to whole segments and
M to whole vectors of CH, behind a margin that lanes left of the stream may read; logits in base 2.
"""

# Triton compiles these functions itself: their arguments are untyped, and `range(0, n)` and unused
# parts of a result are what it wants.
# mypy: disable-error-code=no-untyped-def
# ruff: noqa: PIE808, RUF059, E501, RET505

import os

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # stands for -inf where a difference of two is taken
LOG2E = tl.constexpr(1.4426950408889634)
NATIVE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # compiled, not interpreted


@triton.jit
def power(x):
    """``2 ** x`` in one instruction; tiny results become 0."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def inverse_of(x):
    """``1 / x`` in one instruction, to the last bit."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keep_factor(stream, i, j, seed, threshold, inverse):
    """0 or ``inverse = 1 / (1 - dropout)``: the twin of `pairwise.kept`."""
    word = _mix(stream.to(tl.uint32) ^ seed.to(tl.uint32))
    word = _mix(word + i.to(tl.uint32) * 0x9E3779B9)
    word = _mix(word + j.to(tl.uint32) * 0x85EBCA77)
    return tl.where(word >= threshold, inverse, 0.0)


@triton.jit
def strip_of(turn, worker, W: tl.constexpr):
    """Strips are dealt back and forth, so that every worker gets long and short ones."""
    return turn * W + tl.where(turn % 2 == 0, worker, W - 1 - worker)


@triton.jit
def row_product(row_at, table_at, index, M: tl.constexpr, CH: tl.constexpr):
    """``row . table[index]`` for every lane, in vectors of CH channels."""
    part = tl.arange(0, CH)
    cells = table_at + index[:, None] * M + part[None, :]
    product = tl.sum(tl.load(row_at + part)[None, :] * tl.load(cells), 1)
    for m in tl.static_range(CH, M, CH):
        product += tl.sum(tl.load(row_at + m + part)[None, :] * tl.load(cells + m), 1)
    return product


@triton.jit
def cell(
    q_at, k_at, starts_at, i, d, T, length, window, t, c, slope, bias, peak,
    M: tl.constexpr, CH: tl.constexpr, GATE: tl.constexpr, SCAN: tl.constexpr,
    OFFSET: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One row: symbol equality ``a`` and the next state ``t, c`` of every diagonal.

    Also returns which lanes are candidates, the state before (masked at a segment's start), and
    the segment's start.
    """
    start = i * 0
    reach = tl.where(i < length, i, -1)  # the largest distance of a candidate
    if PACKED:
        start = tl.load(starts_at + i)
        reach = tl.where((i < length) & (start >= 0), i - start, -1)
    valid = d <= reach
    product = row_product(q_at + i * M, k_at, i - d, M, CH)
    if WINDOWED:
        a = power((peak - product) * (-LOG2E * slope))
    elif GATE == "sigmoid":
        a = inverse_of(1.0 + power(product * (-LOG2E * slope) - LOG2E * bias))
    elif GATE == "exp":
        a = power(product * (LOG2E * slope) + LOG2E * bias)
    else:
        a = slope * product + bias
    a = tl.where(valid, a, 0.0)
    if OFFSET == 0:
        t = tl.where(d < reach, t, 0.0)
        c = tl.where(d < reach, c, 0.0)
    if WINDOWED:
        whole = d + window <= reach  # a whole window before this cell lies in the segment
        before = tl.where(whole, power(c * (-LOG2E * slope)), 0.0)
        leaving = row_product(
            q_at + tl.maximum(i - window, 0) * M, k_at, tl.maximum(i - d - window, 0), M, CH
        )
        t_new = a * (t + (1.0 - before))
        c_new = c + (peak - product) - tl.where(whole, peak - leaving, 0.0)
        c_new = tl.where(valid, c_new, 0.0)
    elif SCAN:
        t_new = t + a
        if PACKED:
            t_new = tl.where(valid, t_new, 0.0)
            c = tl.where(valid, c, 0.0)
        c_new = tl.maximum(t_new * (1.0 - a), c)
    else:
        t_new = a * (t + 1.0)
        c_new = c
    return a, t_new, c_new, valid, t, c, start


@triton.jit
def logit(x, i, far, start, sharp, cap, UTILITY: tl.constexpr, CAPPED: tl.constexpr):
    """The score in base 2, and its derivative (natural logits) by the length x; ``far = d``."""
    seen = (i - start).to(tl.float32)
    if UTILITY:
        root = tl.sqrt(1.0 + x)
        z = (sharp * LOG2E) * root - (sharp * LOG2E + tl.log2(tl.maximum(seen, 1.0)))
        slope = (0.5 * sharp) * inverse_of(root)
    else:
        slope = sharp
        if CAPPED:
            slope = tl.where(x <= cap, sharp, 0.0)
            x = tl.minimum(x, cap)
        step = sharp * LOG2E / (seen + 1.0)
        z = (sharp * LOG2E) * x + (seen * step - far * step)  # recency (n - d) / (n + 1)
    return z, slope


@triton.jit
def attend_forward(
    q_ptr, k_ptr, w_ptr, starts_ptr, seed_ptr, top_ptr, sum_ptr, out_ptr,
    T, length, routes, window, slope, bias, sharp, cap, peak, threshold, inverse,
    M: tl.constexpr, CH: tl.constexpr, V: tl.constexpr, CV: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    GATE: tl.constexpr, SCAN: tl.constexpr, UTILITY: tl.constexpr, OFFSET: tl.constexpr,
    CAPPED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of every row over this worker's strips.

    ``top, sum [H, W, T]`` and ``out [H, W, T, V]``: running maximum, sum, weighted values. They
    come in as LOWEST, 0 and 0.
    """
    program = tl.program_id(0).to(tl.int64)
    stream, worker = program // W, (program % W).to(tl.int32)
    q_at, k_at, w_at = q_ptr + stream * M * T, k_ptr + stream * M * T, w_ptr + stream * V * T
    starts_at = starts_ptr
    if PACKED:
        starts_at = starts_ptr + stream // routes * T
    top_at, sum_at, out_at = top_ptr + program * T, sum_ptr + program * T, out_ptr + program * V * T
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    lane = tl.arange(0, BD)
    part = tl.arange(0, CV)
    strips = tl.cdiv(length - OFFSET, BD)
    for turn in range(0, tl.cdiv(strips, W)):
        d0 = OFFSET + strip_of(turn, worker, W) * BD
        d = d0 + lane
        far = d.to(tl.float32)
        t = tl.zeros([BD], tl.float32)
        c = tl.zeros([BD], tl.float32)
        for i in range(d0, length):
            a, t, c, valid, tp, cp, start = cell(
                q_at, k_at, starts_at, i, d, T, length, window, t, c, slope, bias, peak,
                M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
            )  # fmt: skip
            x = t - c if SCAN else t
            z, dz = logit(x, i, far, start, sharp, cap, UTILITY, CAPPED)
            z = tl.where(valid, z, LOWEST * 2)
            before = tl.load(top_at + i)
            best = tl.maximum(tl.max(z, 0), before)
            p = power(z - best)
            shrink = tl.exp2(before - best)
            tl.store(top_at + i, best)
            tl.store(sum_at + i, tl.load(sum_at + i) * shrink + tl.sum(p, 0))
            if DROPOUT:
                p = p * keep_factor(stream, i - d + d, i - d, seed, threshold, inverse)
            for v in tl.static_range(0, V, CV):
                cells = w_at + (i - d + OFFSET)[:, None] * V + v + part[None, :]
                row = out_at + i * V + v + part
                new = tl.sum(p[:, None] * tl.load(cells), 0)
                tl.store(row, tl.load(row) * shrink + new)
        tl.debug_barrier()


@triton.jit
def row_gradient(
    k_at, w_at, g_at, lse_at, delta_at, starts_at, dq_at, u_at, p_at, ring_at,
    i, r, d, lane, far, T, length, window, a, t, c, tp, cp, valid, start,
    ta, ca, slope, sharp, cap, stream, seed, threshold, inverse,
    M: tl.constexpr, CH: tl.constexpr, V: tl.constexpr, CV: tl.constexpr, BD: tl.constexpr,
    CW: tl.constexpr, GATE: tl.constexpr, SCAN: tl.constexpr,
    UTILITY: tl.constexpr, OFFSET: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
    DROPOUT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Row i backwards: writes ``dL/d(q_i . k_j)`` and the weights, returns the states' adjoints.

    ``ta, ca`` come in as what the row below sent up.
    """
    j = i - d
    x = t - c if SCAN else t
    z, dz = logit(x, i, far, start, sharp, cap, UTILITY, CAPPED)
    lse = tl.load(lse_at + i)
    delta = tl.load(delta_at + i)
    p = tl.where(valid, power(z - lse), 0.0)
    gw = row_product(g_at + i * V, w_at, j + OFFSET, V, CV)
    weight = p
    if DROPOUT:
        keep = keep_factor(stream, j + d, j, seed, threshold, inverse)
        weight = p * keep
        gw = gw * keep
    gx = p * (gw - delta) * dz
    if SCAN:
        dt = gx + ta
        dc = ca - gx
        newest = t * (1.0 - a) >= cp
        dtop = tl.where(newest, dc, 0.0)
        dt += dtop * (1.0 - a)
        da = dt - dtop * t
        ta = dt
        ca = tl.where(newest, 0.0, dc)
    elif WINDOWED:
        met = i + window < length  # row i + window, of the same segment, came before
        if PACKED:
            met = met & (tl.load(starts_at + i + window, mask=met, other=-1) == start)
        ring = ring_at + i % window * BD + lane
        gone = tl.where(met, tl.load(ring), 0.0)
        whole = valid & (d + window - 1 <= i - start)
        new = tl.where(whole, ta * power(c * (-LOG2E * slope)), 0.0)
        tl.debug_barrier()  # another row's numbers lie where these go
        tl.store(ring, new)
        tl.debug_barrier()
        ca += new - gone
        dt = gx + ta
        da = tl.where(valid, dt * t - ca, 0.0)  # of log a
        ta = dt * a
    else:
        dt = gx + ta
        da = dt * (tp + 1.0)
        ta = dt * a
    if GATE == "sigmoid":
        ds = da * a * (1.0 - a) * slope
    elif GATE == "exp" and not WINDOWED:
        ds = da * a * slope
    else:
        ds = da * slope
    # Where a = 0 for want of a candidate, `ds` and the recurrence of "dp" vanish by themselves.
    if GATE == "identity":
        ds = tl.where(valid, ds, 0.0)
    if OFFSET == 0:
        ta = tl.where(valid & (j > start), ta, 0.0)
        ca = tl.where(valid & (j > start), ca, 0.0)
    elif PACKED:
        ta = tl.where(valid, ta, 0.0)
        ca = tl.where(valid, ca, 0.0)
    part = tl.arange(0, CH)
    for m in tl.static_range(0, M, CH):
        row = dq_at + i * M + m + part
        new = tl.sum(ds[:, None] * tl.load(k_at + j[:, None] * M + m + part[None, :]), 0)
        tl.store(row, tl.load(row) + new)
    column = r * CW + r + (BD - 1) - lane
    tl.store(u_at + column, ds)
    tl.store(p_at + column, weight)
    return ta, ca


@triton.jit
def gather(
    rows_at, weights_at, out_at, place, T,
    M: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr, SEG: tl.constexpr,
):  # fmt: skip
    """``out[place] += sum over the segment's rows of weight[row] * rows[row]``, a lane a place."""
    part = tl.arange(0, CH)
    inside = (place >= 0) & (place < T)
    for m in tl.static_range(0, M, CH):
        cells = out_at + place[:, None] * M + m + part[None, :]
        total = tl.load(cells, mask=inside[:, None], other=0.0)
        for r in tl.static_range(SEG):
            weight = tl.load(weights_at + r * CW)
            total += weight[:, None] * tl.load(rows_at + r * M + m + part)[None, :]
        tl.store(cells, total, mask=inside[:, None])


@triton.jit
def attend_backward(
    q_ptr, k_ptr, w_ptr, g_ptr, lse_ptr, delta_ptr, starts_ptr, seed_ptr,
    dq_ptr, dk_ptr, dw_ptr, mark_ptr, tile_ptr, ring_ptr,
    T, length, routes, window, slope, bias, sharp, cap, peak, threshold, inverse,
    M: tl.constexpr, CH: tl.constexpr, V: tl.constexpr, CV: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, SEG: tl.constexpr,
    GATE: tl.constexpr, SCAN: tl.constexpr, UTILITY: tl.constexpr, OFFSET: tl.constexpr,
    CAPPED: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, WINDOWED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k ``[H, W, T, M]`` and w ``[H, W, T, V]``, summed over this worker's strips.

    A strip is marched down once, leaving its state every SEG rows in `mark`; then the segments go
    up: a segment is marched again with a mark every 4 rows (DENSE leaves those on the way down and
    saves this march, for four times the memory), and each 4 rows once more, now held in
    registers and walked backwards. A segment's ``dL/d(q . k)`` and weights go through `tile`, where
    they are read again a column a lane for the gradients of k and w.
    """
    program = tl.program_id(0).to(tl.int64)
    stream, worker = program // W, (program % W).to(tl.int32)
    q_at, k_at, w_at = q_ptr + stream * M * T, k_ptr + stream * M * T, w_ptr + stream * V * T
    g_at, lse_at, delta_at = g_ptr + stream * V * T, lse_ptr + stream * T, delta_ptr + stream * T
    starts_at = starts_ptr
    if PACKED:
        starts_at = starts_ptr + stream // routes * T
    dq_at, dk_at = dq_ptr + program * M * T, dk_ptr + program * M * T
    dw_at = dw_ptr + program * V * T
    segments = T // SEG
    MARK: tl.constexpr = 4 if DENSE else SEG  # rows between the marks of the way down
    mark_at = mark_ptr + program * (T // MARK + SEG // 4) * 2 * BD
    near_at = mark_at + T // MARK * 2 * BD
    CW: tl.constexpr = BD + 32  # whole blocks of 32; the band needs BD + SEG
    u_at = tile_ptr + program * 2 * SEG * CW
    p_at = u_at + SEG * CW
    ring_at = ring_ptr + program * window * BD
    PAIR: tl.constexpr = SCAN or WINDOWED  # a state is two numbers
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    lane = tl.arange(0, BD)
    wide = tl.arange(0, 32)
    strips = tl.cdiv(length - OFFSET, BD)
    for turn in range(0, tl.cdiv(strips, W)):
        d0 = OFFSET + strip_of(turn, worker, W) * BD
        d = d0 + lane
        far = d.to(tl.float32)
        first = d0 // SEG
        t = tl.zeros([BD], tl.float32)
        c = tl.zeros([BD], tl.float32)
        for s in range(first, segments):
            for four in range(0, SEG // 4):
                if DENSE or four == 0:
                    here = mark_at + (s * (SEG // MARK) + four % (SEG // MARK)) * 2 * BD + lane
                    tl.store(here, t)
                    if PAIR:
                        tl.store(here + BD, c)
                for r in tl.static_range(4):
                    a, t, c, valid, tp, cp, start = cell(
                        q_at, k_at, starts_at, s * SEG + four * 4 + r, d, T, length, window, t, c, slope, bias, peak,
                        M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
                    )  # fmt: skip
        tl.debug_barrier()  # marks are read in another layout than they were written in
        ta = tl.zeros([BD], tl.float32)
        ca = tl.zeros([BD], tl.float32)
        for back in range(0, segments - first):
            s = segments - 1 - back
            if DENSE:
                near_at = mark_at + s * (SEG // 4) * 2 * BD
            else:
                t = tl.load(mark_at + s * 2 * BD + lane)
                c = tl.zeros([BD], tl.float32)
                if PAIR:
                    c = tl.load(mark_at + s * 2 * BD + BD + lane)
                for four in range(0, SEG // 4):
                    tl.store(near_at + four * 2 * BD + lane, t)
                    if PAIR:
                        tl.store(near_at + four * 2 * BD + BD + lane, c)
                    for r in tl.static_range(4):
                        a, t, c, valid, tp, cp, start = cell(
                            q_at, k_at, starts_at, s * SEG + four * 4 + r, d, T, length, window, t, c, slope, bias, peak,
                            M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
                        )  # fmt: skip
            tl.debug_barrier()
            for again in range(0, SEG // 4):
                r = SEG - 4 - again * 4
                i = s * SEG + r
                t = tl.load(near_at + r // 4 * 2 * BD + lane)
                c = tl.zeros([BD], tl.float32)
                if PAIR:
                    c = tl.load(near_at + r // 4 * 2 * BD + BD + lane)
                a0, t0, c0, v0, tp0, cp0, s0 = cell(
                    q_at, k_at, starts_at, i, d, T, length, window, t, c, slope, bias, peak,
                    M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
                )  # fmt: skip
                a1, t1, c1, v1, tp1, cp1, s1 = cell(
                    q_at, k_at, starts_at, i + 1, d, T, length, window, t0, c0, slope, bias, peak,
                    M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
                )  # fmt: skip
                a2, t2, c2, v2, tp2, cp2, s2 = cell(
                    q_at, k_at, starts_at, i + 2, d, T, length, window, t1, c1, slope, bias, peak,
                    M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
                )  # fmt: skip
                a3, t3, c3, v3, tp3, cp3, s3 = cell(
                    q_at, k_at, starts_at, i + 3, d, T, length, window, t2, c2, slope, bias, peak,
                    M, CH, GATE, SCAN, OFFSET, PACKED, WINDOWED,
                )  # fmt: skip
                ta, ca = row_gradient(
                    k_at, w_at, g_at, lse_at, delta_at, starts_at, dq_at, u_at, p_at, ring_at,
                    i + 3, r + 3, d, lane, far, T, length, window,
                    a3, t3, c3, tp3, cp3, v3, s3, ta, ca,
                    slope, sharp, cap, stream, seed, threshold, inverse,
                    M, CH, V, CV, BD, CW, GATE, SCAN, UTILITY, OFFSET, CAPPED, PACKED, DROPOUT, WINDOWED,
                )  # fmt: skip
                ta, ca = row_gradient(
                    k_at, w_at, g_at, lse_at, delta_at, starts_at, dq_at, u_at, p_at, ring_at,
                    i + 2, r + 2, d, lane, far, T, length, window,
                    a2, t2, c2, tp2, cp2, v2, s2, ta, ca,
                    slope, sharp, cap, stream, seed, threshold, inverse,
                    M, CH, V, CV, BD, CW, GATE, SCAN, UTILITY, OFFSET, CAPPED, PACKED, DROPOUT, WINDOWED,
                )  # fmt: skip
                ta, ca = row_gradient(
                    k_at, w_at, g_at, lse_at, delta_at, starts_at, dq_at, u_at, p_at, ring_at,
                    i + 1, r + 1, d, lane, far, T, length, window,
                    a1, t1, c1, tp1, cp1, v1, s1, ta, ca,
                    slope, sharp, cap, stream, seed, threshold, inverse,
                    M, CH, V, CV, BD, CW, GATE, SCAN, UTILITY, OFFSET, CAPPED, PACKED, DROPOUT, WINDOWED,
                )  # fmt: skip
                ta, ca = row_gradient(
                    k_at, w_at, g_at, lse_at, delta_at, starts_at, dq_at, u_at, p_at, ring_at,
                    i, r, d, lane, far, T, length, window,
                    a0, t0, c0, tp0, cp0, v0, s0, ta, ca,
                    slope, sharp, cap, stream, seed, threshold, inverse,
                    M, CH, V, CV, BD, CW, GATE, SCAN, UTILITY, OFFSET, CAPPED, PACKED, DROPOUT, WINDOWED,
                )  # fmt: skip
            tl.debug_barrier()
            # Column c of the tile is key j = left + c; row r has its band at c in [r, r + BD).
            left = s * SEG - d0 - (BD - 1)
            for block in range(0, CW // 32):
                column = block * 32 + wide
                j = left + column
                gather(q_at + s * SEG * M, u_at + column, dk_at, j, T, M, CH, CW, SEG)
                gather(g_at + s * SEG * V, p_at + column, dw_at, j + OFFSET, T, V, CV, CW, SEG)
            tl.debug_barrier()
