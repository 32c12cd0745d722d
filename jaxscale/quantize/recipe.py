"""Recipes: which weights are rounded to what, by regular expressions over their paths."""

import dataclasses
import re
from typing import Literal, get_args

from jaxscale.models.cache import CacheFormat
from pallas_kernels.quantized_matmul.array import Activations, Format

Method = Literal["rtn", "awq", "gptq", "smoothquant", "fmpq"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """What becomes of a weight.

    format: of its values.
    group: how many numbers along the contracted dims share a scale; None: all of them, one scale per channel.
    activations: what a matmul rounds its other operand to, one scale for each row and group.
    """

    format: Format
    group: int | None = None
    symmetric: bool = True
    activations: Activations | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The first rule whose pattern is found in a weight's path (`layers/attn/wq`) decides; None leaves it as it is.

    method: how values are chosen: to the nearest (rtn), or with the statistics of a calibration set. Of activations in
      4 bits these also say which keep 8; fmpq asks for no more than that.
    cache: what the recipe is meant to be run with: `generate(..., cache_format=recipe.cache)`. Weights do not change.
    """

    rules: tuple[tuple[str, Rounding | None], ...]
    method: Method = "rtn"
    cache: CacheFormat | None = None

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is unknown; use one of {', '.join(get_args(Method))}")
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"the recipe's pattern {pattern!r} is no regular expression: {e}") from None

    def rounding(self, path: str) -> Rounding | None:
        for pattern, rounding in self.rules:
            if re.search(pattern, path):
                return rounding
        return None


def to_nearest(recipe: Recipe | str) -> Recipe:
    """A recipe, or the one of that name, that rounds to the nearest.

    Raises:
      ValueError: there is none, or its method needs a calibration set.
    """
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    if recipe.method != "rtn":
        raise ValueError(
            f"{recipe.method} needs a calibration set: jaxscale convert --text FILE, or "
            "jaxscale.quantize.calibrate.quantize_calibrated"
        )
    return recipe


_NAME = re.compile(
    r"w(?P<w>4|8)a(?P<a>4|8|16)(kv(?P<kv>4|8))?(?P<fp8>-fp8)?(-g(?P<g>\d+))?(?P<sym>-sym)?"
    r"(-(?P<method>awq|gptq|smoothquant|fmpq))?"
)


def parse_recipe(name: str) -> Recipe:
    """`w4a16-g64`, `w4a16-g64-sym`, `w8a16`, `w8a8`, `w8a8-fp8`, `w4a16-g64-awq`, `w4a16-g32-gptq`, `w8a8-smoothquant`,
    `w4a4kv4-g64-fmpq`.

    Weights in 4 or 8 bits, activations in 16 (as they are), 8 or 4, keys and values in 8 or 4 (kv4); a group size, else
    one scale per channel. Groups of 4 bits have offsets, but with -sym, which is a little faster and coarser. Every
    matrix is rounded so; what meets the vocabulary's keeps its activations as they are.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"no recipe {name!r}; a recipe is w4 or w8, a4, a8 or a16, then kv4 or kv8, -fp8, a group as -g64, -sym, a "
            f"method (-awq, -gptq, -smoothquant, -fmpq) where wanted, as in w4a16-g64, w8a8, w8a8-fp8, w4a16-g64-awq"
        )
    bits, fp8, method = found["w"], found["fp8"], found["method"]
    if fp8 and "4" in (bits, found["a"], found["kv"]):
        raise ValueError(f"recipe {name!r}: fp8 has 8 bits; use w8a8-fp8 or w8a16-fp8")
    if found["sym"] and (bits == "8" or not found["g"]):
        raise ValueError(f"recipe {name!r}: -sym leaves out the offsets of groups of 4 bits; the others have none")
    if method == "smoothquant" and found["a"] != "8":
        raise ValueError(f"recipe {name!r}: smoothquant moves scales from activations of 8 bits; use w8a8-smoothquant")
    if method == "fmpq" and found["a"] != "4":
        raise ValueError(f"recipe {name!r}: fmpq keeps some activations of 4 bits in 8; use w4a4-g64-fmpq")
    group = int(found["g"]) if found["g"] else None
    four: Format = "uint4" if group and not found["sym"] else "int4"
    format: Format = "float8_e4m3fn" if fp8 else "int8" if bits == "8" else four
    eight = "float8_e4m3fn" if fp8 else "int8"
    narrow: dict[str | None, Activations | None] = {None: None, "16": None, "8": eight, "4": "int4"}
    activations, cache = narrow[found["a"]], narrow[found["kv"]]
    inside = Rounding(format=format, group=group, activations=activations)
    outside = dataclasses.replace(inside, activations=None)
    return Recipe(rules=(("embed$|head$", outside), ("", inside)), method=method or "rtn", cache=cache)  # pyright: ignore
