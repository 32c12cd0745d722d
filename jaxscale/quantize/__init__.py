"""Quantization of models. Calling the module rounds the weights: `jaxscale.quantize(params, "w4a16-g64", specs)`."""

import sys
import types
from typing import Any


class _Quantizer(types.ModuleType):
    """A package that is a function as well: a call is apply.quantize."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from jaxscale.quantize.apply import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _Quantizer
