"""The planner. Calling the module plans any pure function: `jaxscale.plan(loss_fn, params, batch, topology=...)`.

help(jaxscale.plan.function.plan) says what the call takes, returns and raises.
"""

import sys
import types
from typing import Any


class _Planner(types.ModuleType):
    """A package that is a function as well: jaxscale.plan.search, .aot, ... stay modules, a call is function.plan."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from jaxscale.plan.function import plan

        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Planner
