"""Ragged paged attention: queries of many sequences attend to keys and values that lie in pages.

``reference.py`` (float64 NumPy) is the meaning; every other implementation has its signature and is tested against it.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import checks, reference, xla

IMPLEMENTATIONS = {"reference": reference.ragged_paged_attention, "xla": xla.ragged_paged_attention}


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    kv_pages: Float[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: float | Float[Array, ""] | None = None,
    v_scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    implementation: str = "xla",
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends each query token to its own sequence's pages, causally.

    Query j of row s (of q_len = ``cu_q_lens[s + 1] - cu_q_lens[s]`` new tokens) stands at position ``kv_lens[s] - q_len + j``
    and sees the positions up to its own, within ``sliding_window`` if given. Whatever lies in pages that a row does not own,
    beyond a row's ``kv_lens``, and in query tokens that belong to no row, has no influence, be it NaN.

    Args:
        q: Query tokens of all rows, flat; row s holds tokens ``cu_q_lens[s]:cu_q_lens[s + 1]``.
        kv_pages: The pool of one layer; K of head k at ``2k`` and V at ``2k + 1`` of axis 2. float32, bfloat16 or float16.
        kv_lens: int32, tokens of each sequence, the new ones included (they must be in the pages already); 0 for padding rows.
        block_tables: int32, page ids of each row in order of position; entries beyond ``kv_lens`` may be any valid id.
        cu_q_lens: int32, running sum of the rows' new tokens; padding rows repeat the total.
        distribution: int32 ``[a, b, c]``: rows ``0:a`` hold exactly one token each, rows ``a:c`` any number, rows from c on are
            padding. b lies between a and c and is a kernel's own choice.
        sm_scale: Multiplies the scores before the soft cap.
        sliding_window: Number of positions a query sees, its own included; None for all.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; None for no cap.
        sinks: float32, one score per query head that joins the softmax's sum and carries no value.
        k_scale: Scalar that stored keys are multiplied with; None for 1.
        v_scale: Scalar that stored values are multiplied with; None for 1.
        return_lse: Whether to return the log of the softmax's sum too, sinks included.
        implementation: One of ``IMPLEMENTATIONS``.

    Returns:
        Outputs in q's dtype; zeros for tokens of no row and for tokens without a key. With ``return_lse`` also float32 ``[T, H]``,
        -inf where nothing was summed.

    Raises:
        ValueError: A shape, dtype or option does not fit; the message names the argument.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    checks.check_arguments(
        q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution,
        sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return IMPLEMENTATIONS[implementation](
        q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution,
        sm_scale=sm_scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        return_lse=return_lse,
    )  # fmt: skip
