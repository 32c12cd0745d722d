"""One save at a time on a background thread; its failure is kept until somebody asks."""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Literal

log = logging.getLogger("jaxscale.checkpoint")

SAY_SECONDS = 10.0  # a wait that is longer is logged

OnError = Literal["continue", "stop"]


class Background:
    """Runs `write()` behind training.

    Args:
      explain: (step, error) -> the OSError to raise for a save that failed; may clean up after it.
      on_error: "continue": a failure is logged, and `wait` raises it if no later save succeeded. "stop": the next
        `start` raises it.
    """

    def __init__(self, explain: Callable[[int, BaseException], OSError], on_error: OnError):
        self.explain, self.on_error = explain, on_error
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: concurrent.futures.Future[None] | None = None
        self._step = -1
        self._failure: OSError | None = None

    def ready(self) -> None:
        """Waits for the save under way; raises its failure if failures are to stop training."""
        self.finish()
        if self.on_error == "stop":
            self.raise_failure()

    def start(self, step: int, write: Callable[..., None], *args: Any) -> None:
        self._step = step
        self._future = self._worker.submit(write, *args)

    def finish(self) -> None:
        """Waits for the save under way and keeps its failure."""
        future, self._future = self._future, None
        if future is None:
            return
        try:
            with contextlib.suppress(TimeoutError):
                future.exception(SAY_SECONDS)
            if not future.done():
                log.warning("waiting for the save of step %d, which is still under way", self._step)
            future.result()
            self._failure = None
        except Exception as error:
            self._failure = self.explain(self._step, error)
            self._failure.__cause__ = error
            log.error("%s", self._failure)

    def raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        self.finish()
        self.raise_failure()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
