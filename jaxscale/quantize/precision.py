"""What matmuls are rounded to in training, by name: `fp8`, `fp8-current`, `int8`, or a recipe to train for."""

import dataclasses
from typing import Any, Literal

from jaxscale.quantize.recipe import Recipe, parse_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What the operands of matmuls are rounded to.

    weights, activations, gradients: formats; of gradients those of the matmul's output.
    rows: activations and gradients have a scale for each token, and the weight's gradient is not rounded; else each
      tensor has one.
    delayed: scales of activations and gradients come from the last steps' largest numbers, which are part of the state:
      one pass over a tensor instead of two.
    stochastic: gradients are rounded up or down at random, right on the average; what is drawn depends on their bits.
    skip: a regular expression; a weight whose path holds it is left as it is. "": none.
    """

    weights: Literal["float8_e4m3fn", "int8"]
    activations: Literal["float8_e4m3fn", "int8"]
    gradients: Literal["float8_e5m2", "float8_e4m3fn", "int8"]
    rows: bool = False
    delayed: bool = False
    stochastic: bool = False
    skip: str = ""

    def __post_init__(self):
        if len({"int" in f for f in (self.weights, self.activations, self.gradients)}) > 1:
            raise ValueError(
                f"weights={self.weights}, activations={self.activations} and gradients={self.gradients} meet in "
                "matmuls; use int8 for all or float8 for all"
            )
        if self.delayed and self.rows:
            raise ValueError("delayed=True is for scales of whole tensors; with rows=True scales are the tokens' own")


PRECISIONS = {
    "fp8": Precision(weights="float8_e4m3fn", activations="float8_e4m3fn", gradients="float8_e5m2", delayed=True),
    "fp8-current": Precision(weights="float8_e4m3fn", activations="float8_e4m3fn", gradients="float8_e5m2"),
    "int8": Precision(weights="int8", activations="int8", gradients="int8", rows=True, stochastic=True),
}


def parse_precision(name: str, skip: str = "") -> Precision | Recipe:
    """`fp8` (delayed scaling), `fp8-current`, `int8`; or a recipe, such as w4a16-g64, to train for.

    Args:
      skip: a regular expression; weights whose path holds it are left as they are.
    """
    if name in PRECISIONS:
        return dataclasses.replace(PRECISIONS[name], skip=skip)
    try:
        recipe = parse_recipe(name)
    except ValueError as e:
        raise ValueError(f"no precision {name!r}: use {', '.join(PRECISIONS)}, or a recipe to train for; {e}") from None
    if recipe.method != "rtn":
        raise ValueError(f"precision {name!r}: training rounds to the nearest; leave -{recipe.method} out")
    if recipe.cache is not None:
        raise ValueError(f"precision {name!r}: training has no cache to round; leave kv out")
    return dataclasses.replace(recipe, rules=((skip, None), *recipe.rules)) if skip else recipe


def compiler_options(precision: Precision | Recipe, platform: str) -> dict[str, Any]:
    """For XLA: on a GPU float8 matmuls go to cuBLASLt; timing Triton's beside them takes minutes."""
    fp8 = isinstance(precision, Precision) and "float8" in precision.weights
    return {"xla_gpu_enable_triton_gemm": False} if fp8 and platform in ("gpu", "cuda") else {}
