"""An object store over loopback, and levels with intervals of their own."""

import http.server
import threading
import urllib.parse
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint import (
    Checkpointer,
    CorruptCheckpointError,
    HostPool,
    Level,
    Levels,
    MemoryCheckpointer,
    RemoteCheckpointer,
    arrays,
    diff_steps,
    verify_step,
)
from jaxscale.checkpoint import layout as lay
from jaxscale.checkpoint.remote_path import RemotePath
from jaxscale.mesh import make_mesh

from .conftest import abstract, bits
from .test_memory import free_addresses


class FakeS3(http.server.BaseHTTPRequestHandler):
    """Objects in a dict: the few requests of S3's protocol that a key-value store needs."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: two would wait for each other
    objects: dict[str, bytes]

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def key(self):
        return urllib.parse.unquote(urllib.parse.urlparse(self.path).path).removeprefix("/bucket").lstrip("/")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))
        if "list-type" in query:
            found = sorted(k for k in self.objects if k.startswith(query.get("prefix", "")))
            rows = "".join(
                f"<Contents><Key>{escape(k)}</Key><Size>{len(self.objects[k])}</Size></Contents>" for k in found
            )
            body = f"<ListBucketResult><KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>{rows}"
            return self.reply(200, f"{body}</ListBucketResult>".encode())
        if self.key() not in self.objects:
            return self.reply(200 if not self.key() else 404, x_amz_bucket_region="us-east-1")
        value = self.objects[self.key()]
        tag = f'"{hash(value) & 0xFFFFFFFF:08x}"'
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            first = int(first) if first else len(value) - int(last)
            end = min(int(last) + 1 if last and self.headers["Range"][6] != "-" else len(value), len(value))
            return self.reply(206, value[first:end], ETag=tag, Content_Range=f"bytes {first}-{end - 1}/{len(value)}")
        return self.reply(200, value, ETag=tag)

    def do_PUT(self):
        value = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self.key()] = value
        self.reply(200, ETag=f'"{hash(value) & 0xFFFFFFFF:08x}"')

    def do_DELETE(self):
        self.objects.pop(self.key(), None)
        self.reply(204)

    def log_message(self, *args):
        pass


@pytest.fixture
def s3():
    """(kvstore JSON of an empty bucket served over loopback, its objects)"""
    handler = type("Bucket", (FakeS3,), {"objects": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield (
        {
            "driver": "s3",
            "bucket": "bucket",
            "path": "run",
            "endpoint": endpoint,
            "aws_region": "us-east-1",
            "aws_credentials": {"type": "anonymous"},
            "s3_request_retries": {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"},
        },
        handler.objects,
    )
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_kvstores_of_tensorstore():
    for url, driver in (("s3://bucket/a/run", "s3"), ("gs://bucket/a/run", "gcs")):
        path = RemotePath.open(url) / "100"
        base = {"driver": driver, "bucket": "bucket", "path": "a/run/100/state/"}
        base["context"] = {f"{driver}_request_retries": {"max_retries": 6}}
        assert arrays._database(path) == {"driver": "ocdbt", "base": base}
        assert str(path) == f"{driver}://bucket/a/run/100"
    assert arrays._database("/data/run/100") == {"driver": "ocdbt", "base": "file:///data/run/100/state/"}


def test_steps_in_an_object_store(tmp_path, s3, rng, caplog):
    """Copied there, read from there into other shards, through a layout; damage is named, the step before loads."""
    location, objects = s3
    where = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp"))
    states = {}
    for step in (1, 2, 3):
        values = {"w": rng.normal(size=(64, 32)).astype(np.float32), "b": rng.normal(size=8).astype(np.float32)}
        params = {n: jax.device_put(x, where) for n, x in values.items()}
        states[step] = {"params": params, "key": jax.random.key(step), "n": step}
    with Checkpointer(tmp_path) as disk:
        remote = RemoteCheckpointer(location, disk, keep_last=2)
        for step, state in states.items():
            disk.save(step, state, metadata={"position": step})
            assert remote.copy(step)  # the save is still under way
        remote.wait()
        assert remote.steps() == [2, 3]
        assert not any("/1/" in key or key.startswith("run/1/") for key in objects)
        assert remote.metadata()["position"] == 3
        assert not remote.copy(3)
        turned = NamedSharding(make_mesh(tp=4, dp=2), PartitionSpec(None, "tp"))
        params = {
            "w": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=turned),
            "b": jax.ShapeDtypeStruct((8,), np.float32),
        }
        target = abstract(states[3]) | {"params": params}
        restored = remote.restore(target)
        assert bits(restored) == bits(states[3])
        assert restored["params"]["w"].sharding == turned
        flat = remote.restore({"params": {"w": np.zeros((32, 64), np.float32)}}, 2,
                              layout=(lay.transpose("w", (1, 0)),), only="params/w")  # fmt: skip
        np.testing.assert_array_equal(flat["params"]["w"], np.asarray(states[2]["params"]["w"]).T)
        with pytest.raises(ValueError, match=r"does not fit: 1 missing: more"):
            remote.restore(target | {"more": np.zeros(2)})
        # A flipped bit, a missing object, an object cut short.
        needle = np.asarray(states[3]["params"]["w"])[:8].tobytes()
        (key,) = [k for k, v in objects.items() if needle in v and k.startswith("run/3/")]
        clean = objects[key]
        flipped = bytearray(clean)
        flipped[clean.index(needle) + 5] ^= 1
        objects[key] = bytes(flipped)
        with pytest.raises(CorruptCheckpointError, match="the checksum of params/w differs"):
            remote.restore(target, 3)
        assert bits(remote.restore(target)) == bits(states[2])
        assert "falling back" in caplog.text
        del objects[key]
        with pytest.raises(CorruptCheckpointError, match=rf"file {key.removeprefix('run/3/')} is missing"):
            remote.restore(target, 3)
        objects[key] = clean[: len(clean) // 2]
        with pytest.raises(CorruptCheckpointError, match="damaged"):
            remote.restore(target, 3)
        objects[key] = clean
        assert bits(remote.restore(target)) == bits(states[3])
        remote.close()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        RemoteCheckpointer(location | {"path": "elsewhere"}).restore(target)


def test_levels_with_intervals_of_their_own(tmp_path, rng, caplog):
    """Memory every 2 steps, disk every 4, the object store every 8; what is gone is taken from the next."""
    (address,) = free_addresses(1)
    pool = HostPool(2 * 3 * 1024 * 4 + 64)
    step_of = lambda state: int(state["x"][0])
    target = {"x": jnp.zeros(3 * 1024)}

    def open_levels():
        disk = Checkpointer(tmp_path / "disk")
        memory = MemoryCheckpointer([address], job="job", lost=0)
        remote = RemoteCheckpointer({"driver": "file", "path": str(tmp_path / "far")}, disk)
        return Levels([Level(memory, 2), Level(disk, 4), Level(remote, 8)], pool=pool), memory

    levels, memory = open_levels()
    with levels:
        assert levels.latest_step() is None
        with pytest.raises(FileNotFoundError, match="none of 3 levels"):
            levels.restore(target)
        saved = [step for step in range(1, 15) if levels.save(step, {"x": jnp.full(3 * 1024, float(step))},
                                                              metadata={"at": step})]  # fmt: skip
        levels.wait()
        assert saved == [2, 4, 6, 8, 10, 12, 14]
        assert [level.store.steps() for level in levels.levels] == [[12, 14], [8, 12], [8]]
        assert pool.used_bytes == 0
        assert 3 * 1024 * 4 <= pool.peak_bytes <= pool.limit_bytes
        assert step_of(levels.restore(target)) == 14
        assert levels.metadata()["at"] == 14 and levels.metadata(8)["at"] == 8
        # Memory is damaged: the disk's newest, with a word about it.
        path = memory._own.ask("recover", step=14)[0]["path"]
        with open(path, "r+b") as shared:
            shared.write(b"\xff")
        assert step_of(levels.restore(target)) == 12
        assert "taking the next level" in caplog.text
    # Memory is gone with its keeper, then the disk.
    levels, _ = open_levels()
    with levels:
        assert levels.latest_step() == 12
        assert step_of(levels.restore(target)) == 12
    for file in (tmp_path / "disk").rglob("*"):
        if file.is_file():
            file.unlink()
    levels, _ = open_levels()
    with levels:
        assert step_of(levels.restore(target)) == 8
    assert verify_step(tmp_path / "far" / "8") == []  # the same format, so the same tools
    assert diff_steps(tmp_path / "far" / "8", f"file://{tmp_path}/far") == []
    with (
        Checkpointer(f"file://{tmp_path}/far") as far,
        pytest.raises(NotImplementedError, match="let RemoteCheckpointer copy them"),
    ):
        far.save(1, target)


def test_old_copies_are_removed_from_a_mounted_directory(tmp_path, rng):
    far = tmp_path / "far"
    with Checkpointer(tmp_path / "near") as disk:
        remote = RemoteCheckpointer(f"file://{far}", disk, keep_last=1)
        for step in (1, 2):
            disk.save(step, {"w": jnp.asarray(rng.normal(size=3))})
            remote.copy(step)
            remote.wait()
        remote.close()
        assert remote.steps() == [2] and not [path for path in (far / "1").rglob("*") if path.is_file()]


def test_levels_that_do_not_fit_are_refused(tmp_path):
    disk = Checkpointer(tmp_path)
    remote = RemoteCheckpointer({"driver": "memory", "path": "x"}, disk)
    with pytest.raises(ValueError, match=r"a copy every 10 steps needs .* divides 10; its source has 4"):
        Levels([Level(disk, 4), Level(remote, 10)])
    with pytest.raises(ValueError, match="its source has none"):
        Levels([Level(remote, 10)])
    with pytest.raises(ValueError, match="every=0 of Checkpointer"):
        Levels([Level(disk, 0)])
    with pytest.raises(ValueError, match=r"a snapshot needs 4000 bytes .* the pool has 100; raise limit_bytes to 4000"):
        Levels([Level(disk, 1)], pool=HostPool(100)).save(1, {"x": jnp.zeros(1000)})


def test_the_command_line_says_soon_and_why_a_store_is_not_reached(capsys, monkeypatch):
    """After two more tries, not the six of a run; an error without words says its kind."""
    from jaxscale import cli

    opened = RemotePath.open

    def nobody(location, retries):
        assert location == "s3://missing/run"
        where = {"driver": "s3", "bucket": "missing", "endpoint": f"http://{free_addresses(1)[0]}", "aws_region": "x"}
        context = {"s3_request_retries": {"max_retries": retries, "initial_delay": "1ms"}}
        return opened(where | {"aws_credentials": {"type": "anonymous"}, "context": context})

    monkeypatch.setattr(RemotePath, "open", nobody)
    assert cli.main(["checkpoint", "ls", "s3://missing/run"]) == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "All 2 retry attempts failed" in said and len(said.strip().splitlines()) == 1

    class Silent:
        def result(self):
            raise TimeoutError

    with pytest.raises(OSError, match=r"^file:///x cannot be reached: TimeoutError$"):
        RemotePath(None, {"driver": "file", "path": "/x"})._await(Silent())


def test_a_store_that_cannot_be_reached_is_passed_over(tmp_path, caplog, monkeypatch):
    """But not where no other level has a step: training would start anew and lose what the store has."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    nobody = {"driver": "s3", "bucket": "bucket", "endpoint": f"http://{free_addresses(1)[0]}", "aws_region": "x"}
    quickly = {"s3_request_retries": {"max_retries": 1, "initial_delay": "1ms"}}
    with Checkpointer(tmp_path) as disk:
        levels = Levels([Level(disk, 1), Level(RemoteCheckpointer(nobody | {"context": quickly}, disk), 1)])
        for ask in (levels.latest_step, lambda: levels.restore({"x": 0})):
            with pytest.raises(OSError, match=r"^s3://bucket/ cannot be reached: [^\n]*$"):
                ask()
        disk.save(3, {"x": 5})
        disk.wait()
        assert levels.latest_step() == 3 and levels.restore({"x": 0}) == {"x": 5}
        assert "RemoteCheckpointer is passed over: s3://bucket/ cannot be reached" in caplog.text
