"""Triton kernels of causal attention with the bias -slope * sqrt(query - key) over packed documents (paper 3.2).

Flash attention (arXiv 2205.14135, 2307.08691), with these differences; docs/kernels.md gives the reasons:

- one program computes two query heads of a group, so that keys, values, roots and masks serve both: exponentials fill
  the special-function units already, and a root for every score would be as many operations again;
- tiles between documents are never visited, and only tiles that a document's edge or the diagonal cuts are masked;
- backward is two kernels, one for dq and one for dk and dv, each of which sums in a fixed order: no atomics.

Shapes: R rows, T queries, S keys, H query heads, G key/value heads, D head dim. Queries are the last T of the S
positions. Scores are kept undivided, times D^0.5, so that the bias is one FMA and the scale part of the exponential's.

Documents are given by `starts` and `ends` [R, S] int32: of every position, the first of its document and the first
behind it. Strides are those of rows, positions and heads, in elements; elements of a head lie side by side.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pointers(base, row, first, head, strides, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[SIZE, HEAD_DIM]: positions `first` and on of one head."""
    start = base + row.to(tl.int64) * strides[0] + tl.cast(first, tl.int64) * strides[1] + head * strides[2]
    return start + tl.arange(0, SIZE)[:, None] * strides[1] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _load_tile(
    base, row, first, head, strides, length, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """[SIZE, HEAD_DIM]: positions `first` and on of one head; zeros from position `length` on if MASKED."""
    at = _pointers(base, row, first, head, strides, SIZE, HEAD_DIM)
    if MASKED:
        return tl.load(at, mask=(first + tl.arange(0, SIZE) < length)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _key_tiles(starts, first, last, TILE: tl.constexpr):
    """Where the key tiles lie that queries at positions first..last see: (left, full, right, end).

    Tiles from `left` to `full` and from `right` to `end` are cut by a document's edge or by the diagonal; every query
    sees all keys of those from `full` to `right`. All but `end` are multiples of TILE.
    """
    left = tl.load(starts + first) // TILE * TILE
    full = tl.cdiv(tl.load(starts + last), TILE) * TILE
    right = tl.maximum(full, (first + 1) // TILE * TILE)
    return left, full, right, tl.maximum(last + 1, right)


@triton.jit
def _query_tiles(ends, first, last, offset, TILE: tl.constexpr):
    """Where the query tiles lie that see keys first..last, as in `_key_tiles`, counted from position `offset` on."""
    end = tl.maximum(tl.load(ends + last) - offset, 0)
    left = tl.maximum(first - offset, 0) // TILE * TILE
    full = tl.cdiv(tl.minimum(tl.maximum(last - offset, 0), end), TILE) * TILE
    right = tl.maximum(full, tl.maximum(tl.load(ends + first) - offset, 0) // TILE * TILE)
    return left, full, right, tl.maximum(end, right)


@triton.jit
def _heads_of_program(num_heads, num_groups, heads_per_program):
    """(row, first query head, key/value head) of this program, along the grid's first axis."""
    chunk = tl.program_id(0)
    row = chunk // (num_heads // heads_per_program)
    head = chunk % (num_heads // heads_per_program) * heads_per_program
    return row, head, head // (num_heads // num_groups)


@triton.jit
def _forward_tiles(
    state, q, slopes, queries, starts, keys_at, num_keys, first, count, num_before_gap, gap,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to `count` key tiles from `first` on, leaving out `gap` positions after `num_before_gap` of them.

    state: of every head, the weighted sum of values [BLOCK_M, HEAD_DIM], the highest score and the sum of weights so
    far [BLOCK_M] (online softmax); returned as they are after these tiles.
    """
    exponent: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    k_ptr, v_ptr, k_strides, v_strides, row, group = keys_at
    out, highest, total = state
    for step in tl.range(count):
        n = first + step * BLOCK_N + tl.where(step >= num_before_gap, gap, 0)
        k = _load_tile(k_ptr, row, n, group, k_strides, num_keys, BLOCK_N, HEAD_DIM, MASKED)
        v = _load_tile(v_ptr, row, n, group, v_strides, num_keys, BLOCK_N, HEAD_DIM, MASKED)
        distance = (queries - n).to(tl.float32)[:, None] - tl.arange(0, BLOCK_N).to(tl.float32)[None, :]
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)
            visible = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= starts[:, None])
            distance = tl.abs(distance)
        root = tl.sqrt(distance)
        new_out = ()
        new_highest = ()
        new_total = ()
        for h in tl.static_range(HEADS):
            scores = tl.dot(q[h], k.T, input_precision="ieee") - slopes[h] * root
            if MASKED:
                scores = tl.where(visible, scores, float("-inf"))
            top = tl.maximum(highest[h], tl.max(scores, 1))
            # A row that has seen no key yet gets weights of 0, not NaN.
            base = tl.where(top == float("-inf"), 0.0, top) * exponent
            weights = tl.exp2(scores * exponent - base[:, None])
            shrink = tl.exp2(highest[h] * exponent - base)
            new_highest = new_highest + (top,)
            new_total = new_total + (total[h] * shrink + tl.sum(weights, 1),)
            kept = out[h] * shrink[:, None]
            new_out = new_out + (tl.dot(weights.to(v.dtype), v, kept, input_precision="ieee"),)
        out = new_out
        highest = new_highest
        total = new_total
    return out, highest, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, starts_ptr, out_ptr, log_total_ptr,
    q_strides, k_strides, v_strides, out_strides, num_queries, num_keys, num_heads, num_groups,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs, and the log2 of each query's sum of weights, `log_total` [R, H, T] float32.

    Grid: (R * H / HEADS, tiles of BLOCK_M queries), the last queries first, since they have the most keys.
    """
    row, head, group = _heads_of_program(num_heads, num_groups, HEADS)
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    offset = num_keys - num_queries
    rows = m + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    row_starts = starts_ptr + row.to(tl.int64) * num_keys
    starts = tl.load(row_starts + offset + rows, mask=inside, other=0)
    last = offset + tl.minimum(m + BLOCK_M, num_queries) - 1
    left, full, right, end = _key_tiles(row_starts, offset + m, last, BLOCK_N)

    q = ()
    slopes = ()
    out = ()
    highest = ()
    total = ()
    for h in tl.static_range(HEADS):
        q = q + (_load_tile(q_ptr, row, m, head + h, q_strides, num_queries, BLOCK_M, HEAD_DIM, True),)
        slopes = slopes + (tl.load(slopes_ptr + head + h) * HEAD_DIM**0.5,)
        out = out + (tl.zeros([BLOCK_M, HEAD_DIM], tl.float32),)
        highest = highest + (tl.full([BLOCK_M], float("-inf"), tl.float32),)
        total = total + (tl.zeros([BLOCK_M], tl.float32),)
    state = (out, highest, total)
    keys_at = (k_ptr, v_ptr, k_strides, v_strides, row, group)
    num_left = (full - left) // BLOCK_N
    num_cut = num_left + tl.cdiv(end - right, BLOCK_N)
    state = _forward_tiles(
        state, q, slopes, offset + rows, starts, keys_at, num_keys, left, num_cut, num_left, right - full,
        HEADS, HEAD_DIM, BLOCK_N, True,
    )  # fmt: skip
    state = _forward_tiles(
        state, q, slopes, offset + rows, starts, keys_at, num_keys, full, (right - full) // BLOCK_N, 0, 0,
        HEADS, HEAD_DIM, BLOCK_N, False,
    )  # fmt: skip
    out, highest, total = state

    exponent: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    for h in tl.static_range(HEADS):
        out_at = _pointers(out_ptr, row, m, head + h, out_strides, BLOCK_M, HEAD_DIM)
        result = out[h] / total[h][:, None]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        log_total_at = log_total_ptr + (row * num_heads + head + h).to(tl.int64) * num_queries + rows
        tl.store(log_total_at, highest[h] * exponent + tl.log2(total[h]), mask=inside)


@triton.jit
def _dq_tiles(
    dq, q, d_out, log_total, delta, slopes, queries, starts, keys_at, num_keys, first, count, num_before_gap, gap,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to every head's `dq` [BLOCK_M, HEAD_DIM] what `count` key tiles give; tiles as in `_forward_tiles`."""
    exponent: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    k_ptr, v_ptr, k_strides, v_strides, row, group = keys_at
    for step in tl.range(count):
        n = first + step * BLOCK_N + tl.where(step >= num_before_gap, gap, 0)
        k = _load_tile(k_ptr, row, n, group, k_strides, num_keys, BLOCK_N, HEAD_DIM, MASKED)
        v = _load_tile(v_ptr, row, n, group, v_strides, num_keys, BLOCK_N, HEAD_DIM, MASKED)
        distance = (queries - n).to(tl.float32)[:, None] - tl.arange(0, BLOCK_N).to(tl.float32)[None, :]
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)
            visible = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= starts[:, None])
            distance = tl.abs(distance)
        root = tl.sqrt(distance)
        new_dq = ()
        for h in tl.static_range(HEADS):
            scores = tl.dot(q[h], k.T, input_precision="ieee") - slopes[h] * root
            weights = tl.exp2(scores * exponent - log_total[h][:, None])
            if MASKED:
                weights = tl.where(visible, weights, 0.0)
            d_weights = tl.dot(d_out[h], v.T, input_precision="ieee")
            d_scores = (weights * (d_weights - delta[h][:, None])).to(k.dtype)
            new_dq = new_dq + (tl.dot(d_scores, k, dq[h], input_precision="ieee"),)
        dq = new_dq
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, starts_ptr, out_ptr, d_out_ptr, log_total_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, out_strides, d_out_strides, dq_strides,
    num_queries, num_keys, num_heads, num_groups,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of q; and `delta` [R, H, T] float32, the inner product of every output with its gradient, which
    `dk_dv_kernel` reads. Grid as in `forward_kernel`."""
    row, head, group = _heads_of_program(num_heads, num_groups, HEADS)
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    offset = num_keys - num_queries
    rows = m + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    row_starts = starts_ptr + row.to(tl.int64) * num_keys
    starts = tl.load(row_starts + offset + rows, mask=inside, other=0)
    last = offset + tl.minimum(m + BLOCK_M, num_queries) - 1
    left, full, right, end = _key_tiles(row_starts, offset + m, last, BLOCK_N)

    q = ()
    d_out = ()
    log_total = ()
    delta = ()
    slopes = ()
    dq = ()
    for h in tl.static_range(HEADS):
        out_one = _load_tile(out_ptr, row, m, head + h, out_strides, num_queries, BLOCK_M, HEAD_DIM, True)
        d_out_one = _load_tile(d_out_ptr, row, m, head + h, d_out_strides, num_queries, BLOCK_M, HEAD_DIM, True)
        delta_one = tl.sum(out_one.to(tl.float32) * d_out_one.to(tl.float32), 1)
        per_query = (row * num_heads + head + h).to(tl.int64) * num_queries + rows
        tl.store(delta_ptr + per_query, delta_one, mask=inside)
        q = q + (_load_tile(q_ptr, row, m, head + h, q_strides, num_queries, BLOCK_M, HEAD_DIM, True),)
        d_out = d_out + (d_out_one,)
        log_total = log_total + (tl.load(log_total_ptr + per_query, mask=inside, other=0.0),)
        delta = delta + (delta_one,)
        slopes = slopes + (tl.load(slopes_ptr + head + h) * HEAD_DIM**0.5,)
        dq = dq + (tl.zeros([BLOCK_M, HEAD_DIM], tl.float32),)
    keys_at = (k_ptr, v_ptr, k_strides, v_strides, row, group)
    num_left = (full - left) // BLOCK_N
    num_cut = num_left + tl.cdiv(end - right, BLOCK_N)
    dq = _dq_tiles(
        dq, q, d_out, log_total, delta, slopes, offset + rows, starts, keys_at, num_keys, left, num_cut, num_left,
        right - full, HEADS, HEAD_DIM, BLOCK_N, True,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, d_out, log_total, delta, slopes, offset + rows, starts, keys_at, num_keys, full,
        (right - full) // BLOCK_N, 0, 0, HEADS, HEAD_DIM, BLOCK_N, False,
    )  # fmt: skip
    for h in tl.static_range(HEADS):
        dq_at = _pointers(dq_ptr, row, m, head + h, dq_strides, BLOCK_M, HEAD_DIM)
        tl.store(dq_at, (dq[h] * HEAD_DIM**-0.5).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dk_dv_tiles(
    dk, dv, k, v, slopes, keys, ends, queries_at, num_queries, num_heads, offset, first, count, num_before_gap, gap,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to `dk` and `dv` [BLOCK_N, HEAD_DIM] what `count` query tiles of HEADS heads give. Scores are transposed."""
    exponent: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    q_ptr, d_out_ptr, log_total_ptr, delta_ptr, q_strides, d_out_strides, row, head = queries_at
    for step in tl.range(count):
        m = first + step * BLOCK_M + tl.where(step >= num_before_gap, gap, 0)
        rows = m + tl.arange(0, BLOCK_M)
        distance = tl.arange(0, BLOCK_M).to(tl.float32)[None, :] - (keys - offset - m).to(tl.float32)[:, None]
        if MASKED:
            queries = offset + rows
            visible = (keys[:, None] <= queries[None, :]) & (queries[None, :] < ends[:, None])
            distance = tl.abs(distance)
        root = tl.sqrt(distance)
        for h in tl.static_range(HEADS):
            q = _load_tile(q_ptr, row, m, head + h, q_strides, num_queries, BLOCK_M, HEAD_DIM, MASKED)
            d_out = _load_tile(d_out_ptr, row, m, head + h, d_out_strides, num_queries, BLOCK_M, HEAD_DIM, MASKED)
            per_query = (row * num_heads + head + h).to(tl.int64) * num_queries + rows
            if MASKED:
                log_total = tl.load(log_total_ptr + per_query, mask=rows < num_queries, other=0.0)
                delta = tl.load(delta_ptr + per_query, mask=rows < num_queries, other=0.0)
            else:
                log_total = tl.load(log_total_ptr + per_query)
                delta = tl.load(delta_ptr + per_query)
            scores = tl.dot(k, q.T, input_precision="ieee") - slopes[h] * root
            weights = tl.exp2(scores * exponent - log_total[None, :])
            if MASKED:
                weights = tl.where(visible, weights, 0.0)
            dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision="ieee")
            d_weights = tl.dot(v, d_out.T, input_precision="ieee")
            d_scores = (weights * (d_weights - delta[None, :])).to(q.dtype)
            dk = tl.dot(d_scores, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, ends_ptr, d_out_ptr, log_total_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dk_strides, dv_strides,
    num_queries, num_keys, num_heads, num_groups, heads_per_program,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v from `heads_per_program` = P heads each, HEADS at a time: [R, S, H / P, D] float32.

    Grid: (R * H / P, tiles of BLOCK_N keys), the first keys first, since most queries see them.
    """
    row, first_head, group = _heads_of_program(num_heads, num_groups, heads_per_program)
    n = tl.program_id(1) * BLOCK_N
    offset = num_keys - num_queries
    keys = n + tl.arange(0, BLOCK_N)
    inside = keys < num_keys
    row_ends = ends_ptr + row.to(tl.int64) * num_keys
    ends = tl.load(row_ends + keys, mask=inside, other=0)
    last = tl.minimum(n + BLOCK_N, num_keys) - 1
    left, full, right, end = _query_tiles(row_ends, n, last, offset, BLOCK_M)
    num_left = (full - left) // BLOCK_M
    num_cut = num_left + tl.cdiv(end - right, BLOCK_M)

    k = _load_tile(k_ptr, row, n, group, k_strides, num_keys, BLOCK_N, HEAD_DIM, True)
    v = _load_tile(v_ptr, row, n, group, v_strides, num_keys, BLOCK_N, HEAD_DIM, True)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for chunk in tl.range(heads_per_program // HEADS):
        head = first_head + chunk * HEADS
        slopes = ()
        for h in tl.static_range(HEADS):
            slopes = slopes + (tl.load(slopes_ptr + head + h) * HEAD_DIM**0.5,)
        queries_at = (q_ptr, d_out_ptr, log_total_ptr, delta_ptr, q_strides, d_out_strides, row, head)
        dk, dv = _dk_dv_tiles(
            dk, dv, k, v, slopes, keys, ends, queries_at, num_queries, num_heads, offset, left, num_cut, num_left,
            right - full, HEADS, HEAD_DIM, BLOCK_M, True,
        )  # fmt: skip
        dk, dv = _dk_dv_tiles(
            dk, dv, k, v, slopes, keys, ends, queries_at, num_queries, num_heads, offset, full,
            (right - full) // BLOCK_M, 0, 0, HEADS, HEAD_DIM, BLOCK_M, False,
        )  # fmt: skip
    part = first_head // heads_per_program
    dk_at = _pointers(dk_ptr, row, n, part, dk_strides, BLOCK_N, HEAD_DIM)
    dv_at = _pointers(dv_ptr, row, n, part, dv_strides, BLOCK_N, HEAD_DIM)
    tl.store(dk_at, dk * HEAD_DIM**-0.5, mask=inside[:, None])
    tl.store(dv_at, dv, mask=inside[:, None])
