"""Folders of an object store (S3, Google Cloud Storage, anything that is a kvstore of TensorStore) as paths."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxscale.checkpoint.background import one_line

RETRIES = 6  # of a request, a minute in all; TensorStore's own 32 hide a wrong address for a quarter of an hour


class RemotePath:
    """What this package asks of a path, over a kvstore of TensorStore."""

    def __init__(self, store: Any, base: Mapping[str, Any], key: str = ""):
        self.store, self.base, self.key = store, base, key

    @classmethod
    def open(cls, location: str | Mapping[str, Any], retries: int = RETRIES) -> "RemotePath":
        import tensorstore as ts

        spec = ts.KvStore.Spec(location).to_json() if isinstance(location, str) else dict(location)
        path = spec.get("path", "").rstrip("/")
        spec["path"] = path and f"{path}/"
        if spec["driver"] in ("s3", "gcs"):
            spec.setdefault("context", {f"{spec['driver']}_request_retries": {"max_retries": retries}})
        return cls(ts.KvStore.open(spec).result(), spec)

    @property
    def spec(self) -> dict[str, Any]:
        """JSON of the kvstore at this path."""
        return {**self.base, "path": self.base["path"] + self.key}

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.store, self.base, self.key.rpartition("/")[0])

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.store, self.base, f"{self.key}/{name}".lstrip("/"))

    def __str__(self) -> str:
        bucket = self.base.get("bucket", "")
        return f"{self.base['driver']}://{bucket}{'/' if bucket else ''}{self.base['path']}{self.key}"

    def exists(self) -> bool:
        return self._read() is not None or bool(self._keys())

    def iterdir(self) -> Iterator["RemotePath"]:
        for name in dict.fromkeys(key.partition("/")[0] for key in self._keys()):
            yield self / name

    def walk_keys(self) -> list[str]:
        """Names of all files below."""
        return self._keys()

    def is_dir(self) -> bool:
        return bool(self._keys())

    def read_bytes(self) -> bytes:
        value = self._read()
        if value is None:
            raise FileNotFoundError(str(self))
        return value

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, value: bytes) -> None:
        self._await(self.store.write(self.key, value))

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def replace(self, target: "RemotePath") -> None:
        target.write_bytes(self.read_bytes())
        self.unlink()

    def unlink(self, missing_ok: bool = False) -> None:
        self._await(self.store.write(self.key, None))

    def rmtree(self) -> None:
        import tensorstore as ts

        self._await(self.store.delete_range(ts.KvStore.KeyRange(f"{self.key}/", f"{self.key}0")))

    def _read(self) -> bytes | None:
        if not self.key:
            return None
        found = self._await(self.store.read(self.key))
        return None if found.state == "missing" else found.value

    def _keys(self) -> list[str]:
        import tensorstore as ts

        prefix = f"{self.key}/" if self.key else ""
        keys = self.store.list(ts.KvStore.KeyRange(prefix, f"{self.key}0") if prefix else ts.KvStore.KeyRange())
        try:
            return [key.decode()[len(prefix) :] for key in self._await(keys)]
        except OSError as error:
            if self.base["driver"] == "file" and "non-directory" in str(error):  # a file, which holds nothing
                return []
            raise

    def _await(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # TensorStore raises many kinds
            raise OSError(f"{self} cannot be reached: {one_line(error)}") from error
