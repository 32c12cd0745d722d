"""What ragged_dot asks of its input, whatever its matrices are."""

import jax.numpy as jnp

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def check_rows(lhs, rhs, group_sizes, preferred_element_type, takes: str = "rhs [G,K,N]"):
    """The dtype of the output.

    Args:
      takes: what `rhs` must be, for messages.

    Raises:
      ValueError: shapes that disagree, dtypes that are not taken.
    """
    shapes = f"lhs {lhs.shape}, rhs {rhs.shape}, group_sizes {group_sizes.shape}"
    if len(lhs.shape) != 2 or len(rhs.shape) != 3 or len(group_sizes.shape) != 1:
        raise ValueError(f"ragged_dot takes lhs [M,K], {takes}, group_sizes [G]. Got {shapes}")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"ragged_dot: K={lhs.shape[1]} of lhs is not K={rhs.shape[1]} of rhs [G,K,N]. Got {shapes}")
    if rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"ragged_dot: {group_sizes.shape[0]} group sizes for {rhs.shape[0]} matrices; give as many. Got {shapes}"
        )
    if rhs.shape[0] == 0:
        raise ValueError(f"ragged_dot needs at least one group. Got {shapes}")
    if lhs.dtype not in FLOATS:
        raise ValueError(f"ragged_dot takes lhs in float32, bfloat16 or float16. Got {lhs.dtype}")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"ragged_dot: group_sizes must be int32. Got {group_sizes.dtype}")
    dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if dtype not in FLOATS:
        raise ValueError(
            f"ragged_dot: preferred_element_type must be float32, bfloat16 or float16, or None. Got {dtype}"
        )
    return dtype
