"""Steps in an object store: copied there from a local directory, read from there shard by shard.

    disk = Checkpointer("/nvme/run-a")
    remote = RemoteCheckpointer("s3://bucket/run-a", disk)  # gs://, or the JSON of any kvstore of TensorStore
    remote.copy(1000)
    state = remote.restore(abstract_state)

Everything goes through TensorStore, with its credentials (S3: AWS_ACCESS_KEY_ID and its like, or the profile; Google:
application default credentials). No byte passes through the loop or through host memory beyond one file.
"""

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from jaxscale.checkpoint import files, peers, reading
from jaxscale.checkpoint.background import Background, OnError, one_line
from jaxscale.checkpoint.layout import Layout
from jaxscale.checkpoint.remote_path import RemotePath
from jaxscale.checkpoint.store import Checkpointer

FILES_AT_ONCE = 4  # held in host memory while they are sent, 256 MiB each at most


class RemoteCheckpointer:
    """The steps of a run in an object store; `copy` brings them there.

    Args:
      location: "s3://bucket/path", "gs://bucket/path", or the JSON of a TensorStore kvstore, such as
        {"driver": "s3", "bucket": "b", "path": "run-a", "endpoint": "https://..."} for a store that speaks S3.
      source: where the steps are written first; a directory that all processes share.
      keep_last: steps to keep; older ones are removed once a newer one is complete.
      on_error: as in `Checkpointer`.
    """

    def __init__(
        self,
        location: str | Mapping[str, Any],
        source: Checkpointer | None = None,
        *,
        keep_last: int = 2,
        on_error: OnError = "continue",
    ):
        self.directory, self.source, self.keep_last = RemotePath.open(location), source, keep_last
        self._background = Background(self._explain, on_error)
        self._count = 0

    def copy(self, step: int) -> bool:
        """Starts copying a step of `source`, which may still be on its way there; all processes call it."""
        if self.source is None:
            raise ValueError("RemoteCheckpointer was made without a source to copy from")
        self._background.ready()
        if step in self.steps():
            return False
        self._background.start(step, self._copy, step)
        return True

    def steps(self) -> list[int]:
        """Complete steps in ascending order."""
        names = [path.name for path in self.directory.iterdir()]
        numbers = sorted(int(name) for name in names if name.isdigit())
        return [step for step in numbers if reading.read_commit(self.directory / str(step)) is not None]

    def latest_step(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def restore(
        self,
        target: Any,
        step: int | None = None,
        *,
        layout: Layout = (),
        only: str | Sequence[str] | None = None,
        missing: Literal["refuse", "keep"] = "refuse",
    ) -> Any:
        """As `Checkpointer.restore`; each process fetches what its devices hold."""
        self._background.finish()
        known = self.steps()
        if not known or (step is not None and step not in known):
            raise FileNotFoundError(f"no complete checkpoint {'' if step is None else step} in {self.directory}")
        candidates = known if step is None else [step]
        options: dict[str, Any] = {"layout": layout, "only": only, "missing": missing}
        return reading.restore_newest(self.directory, candidates, target, **options)[1]

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        step = self.latest_step() if step is None else step
        commit = None if step is None else reading.read_commit(self.directory / str(step))
        if commit is None:
            raise FileNotFoundError(f"no complete checkpoint in {self.directory}")
        return commit["metadata"]

    def wait(self) -> None:
        """Waits for the copy under way; raises OSError if it failed."""
        self._background.finish()
        self._background.raise_failure()

    def close(self) -> None:
        self._background.close()

    # Copying

    def _copy(self, step: int) -> None:
        assert self.source is not None
        self._count += 1
        failure_key = f"jaxscale/remote/{self.directory}/{step}/{self._count}"
        try:
            self._copy_and_commit(step, self.source.directory / str(step), failure_key)
        except Exception as error:
            peers.report_failure(failure_key, f"process {jax.process_index()}: {one_line(error)}")
            raise

    def _copy_and_commit(self, step: int, folder: Any, failure_key: str) -> None:
        commit = files.await_json(folder / files.COMMIT, failure_key)
        target, me, processes = self.directory / str(step), jax.process_index(), jax.process_count()
        mine = sorted(commit["files"])[me::processes]
        with concurrent.futures.ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda name: (target / name).write_bytes((folder / name).read_bytes()), mine))
        if me:
            files.write_json(target / f"copied.{me}.json", {"files": len(mine)})
            files.await_json(target / files.COMMIT, failure_key)
            return
        for process in range(1, processes):
            files.await_json(target / f"copied.{process}.json", failure_key)
            (target / f"copied.{process}.json").unlink()
        (target / files.COMMIT).write_text((folder / files.COMMIT).read_text())
        for old in self.steps()[: -self.keep_last]:
            files.remove(self.directory / str(old))

    def _explain(self, step: int, error: BaseException) -> OSError:
        return OSError(f"step {step} was not copied to {self.directory}: {one_line(error)}")
