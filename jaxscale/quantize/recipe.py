"""Recipes: which weights are rounded to what, by regular expressions over their paths."""

import dataclasses
import re
from typing import Literal, get_args

from pallas_kernels.quantized_matmul.array import Activations, Format

Method = Literal["rtn", "awq", "gptq", "smoothquant"]


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

    method: how values are chosen: to the nearest (rtn), or with the statistics of a calibration set.
    """

    rules: tuple[tuple[str, Rounding | None], ...]
    method: Method = "rtn"

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


_NAME = re.compile(
    r"w(?P<w>4|8)a(?P<a>8|16)(?P<fp8>-fp8)?(-g(?P<g>\d+))?(?P<sym>-sym)?(-(?P<method>awq|gptq|smoothquant))?"
)


def parse_recipe(name: str) -> Recipe:
    """`w4a16-g64`, `w4a16-g64-sym`, `w8a16`, `w8a8`, `w8a8-fp8`, `w4a16-g64-awq`, `w4a16-g32-gptq`, `w8a8-smoothquant`.

    Weights in 4 or 8 bits, activations in 16 (as they are) or 8; a group size, else one scale per channel. Groups of 4
    bits have offsets, but with -sym, which is a little faster and coarser. Every matrix is rounded so; what meets the
    vocabulary's keeps its activations as they are.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"no recipe {name!r}; a recipe is w4 or w8, a8 or a16, then -fp8, a group as -g64, -sym, a method (-awq, "
            f"-gptq, -smoothquant) where wanted, as in w4a16-g64, w8a8, w8a8-fp8, w4a16-g64-awq"
        )
    bits, fp8, method = found["w"], found["fp8"], found["method"]
    if fp8 and bits == "4":
        raise ValueError(f"recipe {name!r}: fp8 has 8 bits; use w8a8-fp8 or w8a16-fp8")
    if found["sym"] and (bits == "8" or not found["g"]):
        raise ValueError(f"recipe {name!r}: -sym leaves out the offsets of groups of 4 bits; the others have none")
    if method == "smoothquant" and found["a"] != "8":
        raise ValueError(f"recipe {name!r}: smoothquant moves scales from activations of 8 bits; use w8a8-smoothquant")
    group = int(found["g"]) if found["g"] else None
    four: Format = "uint4" if group and not found["sym"] else "int4"
    format: Format = "float8_e4m3fn" if fp8 else "int8" if bits == "8" else four
    activations: Activations | None = None if found["a"] == "16" else "float8_e4m3fn" if fp8 else "int8"
    inside = Rounding(format=format, group=group, activations=activations)
    outside = dataclasses.replace(inside, activations=None)
    return Recipe(rules=(("embed$|head$", outside), ("", inside)), method=method or "rtn")  # pyright: ignore
