"""Ragged paged attention: queries of many sequences attend to keys and values that lie in pages.

``reference.py`` (float64 NumPy) is the meaning; every other implementation has its signature and is tested against it:
``xla`` (every platform), ``mosaic_gpu`` (Hopper), ``triton`` (other NVIDIA GPUs), ``tpu``.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int, Num

from pallas_kernels.kv_write import write_kv_pages, write_quantized_kv_pages
from pallas_kernels.paged_attention import checks
from pallas_kernels.paged_attention.dispatch import (
    IMPLEMENTATIONS,
    choose,
    default_implementation,
    implementations_on,
    naming_what_runs_here,
    resolve,
    sibling,
)
from pallas_kernels.paged_attention.merge import merge_attention_states

__all__ = [
    "IMPLEMENTATIONS",
    "default_implementation",
    "implementations_on",
    "make_work_list",
    "merge_attention_states",
    "ragged_paged_attention",
    "ragged_paged_attention_update",
    "resolve",
    "storage_head_dim",
]

Scale = float | Float[Array, ""] | Float[Array, "N K B"]


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    work: Any = None,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends each query token to its own sequence's pages, causally.

    Query j of row s (of q_len = ``cu_q_lens[s + 1] - cu_q_lens[s]`` new tokens) stands at position ``kv_lens[s] - q_len + j``
    and sees the positions up to its own, within ``sliding_window`` if given. Whatever lies in pages that a row does not own,
    beyond a row's ``kv_lens``, and in query tokens that belong to no row, has no influence, be it NaN. The bits of a row's output
    depend on nothing but the row: not on the rows beside it, nor on where its pages lie.

    Args:
        q: Query tokens of all rows, flat; row s holds tokens ``cu_q_lens[s]:cu_q_lens[s + 1]``. float32, bfloat16 or float16.
        kv_pages: The pool of one layer; K of head k at ``2k`` and V at ``2k + 1`` of axis 2. float32, bfloat16, float16,
            float8_e4m3fn or int8; or uint8 with the bits of float8_e4m3fn, uint16 with those of bfloat16 (for CPUs).
        kv_lens: int32, tokens of each sequence, the new ones included (they must be in the pages already); 0 for padding rows.
        block_tables: int32, page ids of each row in order of position; entries beyond ``kv_lens`` may be any valid id.
        cu_q_lens: int32, running sum of the rows' new tokens; padding rows repeat the total.
        distribution: int32 ``[a, b, c]``: rows ``0:a`` hold exactly one token each, rows ``a:c`` any number, rows from c on are
            padding. b lies between a and c and is a kernel's own choice.
        sm_scale: Multiplies the scores before the soft cap.
        sliding_window: Number of positions a query sees, its own included; None for all.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; None for no cap.
        sinks: float32, one score per query head that joins the softmax's sum and carries no value.
        k_scale: What stored keys are multiplied with: a scalar, or float32 ``[N, K, B]``, one number per token and head (an int8
            pool has these); None for 1.
        v_scale: The same of stored values.
        return_lse: Whether to return the log of the softmax's sum too, sinks included.
        implementation: ``auto`` for what is fastest on the default device, or one of ``IMPLEMENTATIONS``. What an implementation
            lacks goes to another one, with one warning that says so; what cannot run on the device at all is an error
            (``implementations_on`` says what can).
        work: What ``make_work_list`` returned for this step and implementation, to share it between layers; None makes it here.

    Returns:
        Outputs in q's dtype (float64 of ``reference``); zeros for tokens of no row and for tokens without a key. With
        ``return_lse`` also float32 ``[T, H]``, -inf where nothing was summed.

    Raises:
        ValueError: A shape, dtype or option does not fit, or the implementation does not run on this device; the message names the
            argument. Under ``jax.jit`` the device is known only when the program is compiled: what does not run there is told in
            jax's own words.
    """
    options = {"sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
    checks.check_arguments(q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, **options)
    module = choose(implementation, q, kv_pages, **options)
    if module is not sibling(resolve(implementation)):
        work = None  # it was made for another implementation
    with naming_what_runs_here(module):
        return module.ragged_paged_attention(
            q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, sm_scale=sm_scale, **options, return_lse=return_lse, work=work
        )


def ragged_paged_attention_update(
    q: Float[Array, "T H D"],
    kv: Float[Array, "T 2K D"],
    kv_pages: Num[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    work: Any = None,
) -> tuple[Any, Num[Array, "N B 2K D"], Scale | None, Scale | None]:
    """Writes a step's keys and values into pages, then attends to them: one kernel on TPU, two elsewhere.

    Args:
        q: As in ``ragged_paged_attention``, and so are all arguments that are not named here.
        kv: New keys and values of the tokens, K of head k at ``2k`` and V at ``2k + 1`` of axis 1.
        kv_pages: The pool of one layer; donate it (and scales of shape ``[N, K, B]``) to write in place.
        kv_lens: As above.
        block_tables: As above.
        cu_q_lens: As above.
        distribution: As above.
        page_ids: int32, page that each token's K and V go to; N or more for padding tokens, which are not written.
        offsets: int32, position within that page.
        sm_scale: As above.
        sliding_window: As above.
        soft_cap: As above.
        sinks: As above.
        k_scale: As above; with shape ``[N, K, B]`` the new tokens' scales are computed and written.
        v_scale: As above.
        return_lse: As above.
        implementation: As above.
        work: As above.

    Returns:
        What ``ragged_paged_attention`` returns, the pool, and ``k_scale`` and ``v_scale`` as they are now.

    Raises:
        ValueError: A shape, dtype or option does not fit; the message names the argument.
    """
    options = {"sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
    checks.check_arguments(q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, **options)
    checks.check_new_tokens(q, kv, kv_pages, page_ids, offsets)
    scale_per_token = getattr(k_scale, "ndim", 0) == 3
    module = choose(implementation, q, kv_pages, **options)
    if hasattr(module, "ragged_paged_attention_update") and not scale_per_token:
        with naming_what_runs_here(module):
            result, kv_pages = module.ragged_paged_attention_update(
                q, kv, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, page_ids, offsets,
                sm_scale=sm_scale, **options, return_lse=return_lse, work=work,
            )  # fmt: skip
        return result, kv_pages, k_scale, v_scale
    if scale_per_token:
        kv_pages, k_scale, v_scale = write_quantized_kv_pages(kv_pages, k_scale, v_scale, kv, page_ids, offsets)
    else:
        kv_pages = write_kv_pages(kv_pages, kv, page_ids, offsets, k_scale=k_scale, v_scale=v_scale)
    result = ragged_paged_attention(
        q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, sm_scale=sm_scale, sliding_window=sliding_window,
        soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse, implementation=implementation, work=work,
    )  # fmt: skip
    return result, kv_pages, k_scale, v_scale


def make_work_list(
    kv_lens: Int[Array, " S"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    num_tokens: int,
    page_size: int,
    table_width: int,
    implementation: str = "auto",
) -> Any:
    """Returns how an implementation cuts a step's rows into pieces: a pytree that all layers share, or None where it needs none.

    Args:
        kv_lens: As in ``ragged_paged_attention``.
        cu_q_lens: As there.
        distribution: As there.
        num_tokens: T.
        page_size: B.
        table_width: P.
        implementation: As there; the list is good for this one alone.

    Raises:
        ValueError: There is no such implementation.
    """
    module = sibling(resolve(implementation))
    return module.make_work_list(kv_lens, cu_q_lens, distribution, num_tokens=num_tokens, page_size=page_size, table_width=table_width)


def storage_head_dim(head_dim: int, implementation: str = "auto") -> int:
    """Returns the head dimension that pages should be allocated with, so that the implementation itself can serve them.

    A pool of this dimension takes queries, keys and values that are padded with zeros up to it.

    Raises:
        ValueError: There is no such implementation.
    """
    padded: int = sibling(resolve(implementation)).storage_head_dim(head_dim)
    return padded
