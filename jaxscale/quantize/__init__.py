"""Quantization of models. Calling the module rounds the weights: `jaxscale.quantize(params, "w4a16-g64", specs)`.

help(jaxscale.quantize.apply.quantize) says what the call takes, returns and raises.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

from sharding_rules.rules import MEGATRON_FSDP, Rules

if TYPE_CHECKING:
    from jaxscale.quantize.recipe import Recipe


class _Quantizer(types.ModuleType):
    """A package that is a function as well: a call is apply.quantize."""

    def __call__(self, params: Any, recipe: "Recipe | str", specs: Any, *, rules: Rules = MEGATRON_FSDP) -> Any:
        """The same tree with QuantizedArrays where the recipe says so: `jaxscale.quantize.apply.quantize`."""
        from jaxscale.quantize.apply import quantize

        return quantize(params, recipe, specs, rules=rules)


sys.modules[__name__].__class__ = _Quantizer
