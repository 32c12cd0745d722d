"""The collectives of a compiled program, read from its optimised HLO text: `collectives(compiled.as_text())`.

Every collective that one run of the program executes is listed once with `count`, the number of times it runs: an
instruction in the body of a loop is multiplied by the loop's known trip count. The text is the source because it is
the one form that every backend gives, for devices that are here and for topologies that are not.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


SELDOM = "seldom"  # the scope of loops that run only in the rare case


def collectives(hlo_text: str) -> list["Collective"]:
    """Lists the collectives that one run of the program executes, in program order.

    An asynchronous pair counts once. Of a conditional's branches the one with the most traffic counts; the conditionals
    that one line of the program became (forward, computed again, backward) take the same one. A loop whose trip count
    is not known counts as one trip and its collectives say `trips_known=False`; one under `jax.named_scope(SELDOM)`, of
    which the program says that it hardly ever takes a trip, does not count.

    Args:
      hlo_text: `jax.stages.Compiled.as_text()` or any HLO module text.
    """
    module = _Module(hlo_text)
    module.walk(module.entry, 1, True)  # weighs the branches
    module.taken = {line: max(sent, key=sent.__getitem__) for line, sent in module.sent.items()}
    return module.walk(module.entry, 1, True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction. Bytes are per device and per execution, as the program holds them."""

    kind: str  # one of KINDS
    name: str  # the instruction's name in the text
    operand_bytes: int
    result_bytes: int
    groups: tuple[tuple[int, ...], ...]  # partition ids; for a permute its (source, target) pairs
    count: int = 1  # executions per run of the program
    trips_known: bool = True  # False: some enclosing loop has no known trip count and is counted as one trip
    op_name: str = ""  # where the user's program asked for it (HLO metadata)

    @property
    def bytes(self) -> int:
        """The payload: the larger of operand and result (an all-gather's result, a reduce-scatter's operand)."""
        return max(self.operand_bytes, self.result_bytes)

    @property
    def group_size(self) -> int:
        return max(map(len, self.groups), default=1)

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends in all its executions, by the bandwidth-optimal (ring) algorithm."""
        return round(wire_bytes(self.kind, self.bytes, self.group_size) * self.count)

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ, for a mesh of partition ids in row-major order."""
        names, sizes = tuple(mesh_shape), tuple(mesh_shape.values())
        varying = set()
        for group in self.groups:
            coordinates = np.array(np.unravel_index(group, sizes))
            varying |= set(np.flatnonzero((coordinates != coordinates[:, :1]).any(axis=1)))
        return tuple(name for i, name in enumerate(names) if i in varying)


def wire_bytes(kind: str, payload: float, group_size: int) -> float:
    """Bytes that one device sends for one collective of `payload` bytes (see Collective.bytes) over a group.

    Ring all-reduce 2(n-1)/n, all-gather, reduce-scatter and all-to-all (n-1)/n, permute and broadcast 1 (Thakur,
    Rabenseifner, Gropp 2005). A permute over pairs is a group of two.
    """
    if group_size <= 1:
        return 0.0
    if kind in ("collective-permute", "collective-broadcast"):
        return float(payload)
    return payload * (group_size - 1) / group_size * (2 if kind == "all-reduce" else 1)


def census(found: Iterable[Collective]) -> dict[str, int]:
    """Executions by kind: {"all-reduce": 4, "all-gather": 10}."""
    counts: dict[str, int] = {}
    for c in found:
        counts[c.kind] = counts.get(c.kind, 0) + c.count
    return counts


# The text ------------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?\{\s*$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([^\]]*)\]")
_NAME = re.compile(r"%?([A-Za-z_][\w.\-]*)$")
_CALLEES = re.compile(
    r"\b(calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_SELDOM = re.compile(rf'\bop_name="[^"]*\b{SELDOM}\b[^"]*"')
_TRIPS = re.compile(r'"known_trip_count"\s*:\s*\{\s*"n"\s*:\s*"?(\d+)')
_KERNEL_METADATA = re.compile(
    r"kernel_metadata=\{\n[^}]*\}"
)  # what a kernel says of itself, printed over several lines
_KERNEL_SAYS = re.compile(r"kernel_metadata=(\{[^}]*\})")
_LINE = re.compile(r'stack_frame_id=\d+|source_file="[^"]*" source_line=\d+')
_FLOAT8 = re.compile(r"f8e\w+")


class _Module:
    """Computations by name, each a list of (name, text after the equals sign)."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, str]] = {}
        self.entry = ""
        self.num_devices = 1
        self.sent: dict[str, dict[int, float]] = {}  # by the line that wrote a conditional: bytes of each branch
        self.taken: dict[str, int] = {}
        body: dict[str, str] | None = None
        for line in _KERNEL_METADATA.sub(lambda match: match[0].replace("\n", ""), text).splitlines():
            if line.startswith("HloModule"):
                sizes = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)]
                self.num_devices = math.prod(sizes)
            elif " = " in line and body is not None:
                name, rest = line.split(" = ", 1)
                body[name.replace("ROOT", "").strip().lstrip("%")] = rest
            elif line.rstrip().endswith("{") and (match := _HEADER.match(line)):
                body = self.computations[match[2]] = {}
                if match[1]:
                    self.entry = match[2]
            elif line.strip() == "}":
                body = None
        if not self.entry:
            raise ValueError("no ENTRY computation in the text; pass the text of an HLO module, compiled.as_text()")

    def walk(self, computation: str, count: int, known: bool) -> list[Collective]:
        """The collectives below `computation`, which runs `count` times."""
        found: list[Collective] = []
        for name, rest in self.computations.get(computation, {}).items():
            opcode, operands, attributes = _split(rest)
            kind = opcode.removesuffix("-start")
            if (kind in KINDS or opcode in ("while", "custom-call")) and _SELDOM.search(attributes):
                continue
            if kind in KINDS:
                # TPU writes a reduce-scatter as a fusion around an all-reduce and the slice of this device's part.
                if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                found.append(self._collective(computation, name, kind, operands, attributes, count, known))
            elif opcode == "custom-call" and (said := _kernel_metadata(attributes)):
                found.append(_of_kernel(name, said, attributes, count, known))
            elif opcode in ("async-update", "async-done"):
                continue  # the start has been counted
            elif opcode == "while":
                trips = self._trips(attributes)
                body = _callees(attributes)["body"][0]
                found += self.walk(body, count * (1 if trips is None else trips), known and trips is not None)
            elif opcode == "conditional":
                branches = [b for key, names in _callees(attributes).items() if key != "to_apply" for b in names]
                walked = [self.walk(b, count, known) for b in branches]
                line = match[0] if (match := _LINE.search(attributes)) else name
                sent = self.sent.setdefault(line, {})
                for i, inside in enumerate(walked):
                    sent[i] = sent.get(i, 0.0) + sum(c.wire_bytes for c in inside)
                found += walked[self.taken.get(line, max(sent, key=sent.__getitem__))] if walked else []
            elif "calls=" in attributes or opcode == "call":
                for callee in itertools.chain(*_callees(attributes).values()):
                    found += self.walk(callee, count, known)
        return found

    def _collective(self, computation, name, kind, operands, attributes, count, known) -> Collective:
        if kind == "collective-permute":
            groups = _explicit(_braced(attributes, "source_target_pairs=")) or ()
        else:
            groups = self._groups(attributes)
        size = max(map(len, groups), default=1)
        operand_bytes = sum(self._bytes(computation, operand) for operand in operands)
        result_bytes = {"all-gather": operand_bytes * size, "reduce-scatter": operand_bytes // size}
        return Collective(
            kind=kind,
            name=name,
            operand_bytes=operand_bytes,
            # Derived, because the result of an asynchronous start is a tuple of operands, results and contexts.
            result_bytes=result_bytes.get(kind, operand_bytes),
            groups=groups,
            count=count,
            trips_known=known,
            op_name=_op_name(attributes),
        )

    def _bytes(self, computation: str, operand: str) -> int:
        """Bytes of an operand, written with its type ("f32[8] %x") or by its name alone."""
        if _SHAPE.search(operand):
            return _shape_bytes(operand)
        match = _NAME.search(operand.strip())
        definition = self.computations[computation].get(match[1]) if match else None
        if definition is None:
            raise ValueError(f"the operand {operand!r} in {computation} is not defined there; is the HLO text whole?")
        return _shape_bytes(definition[: _type_end(definition)])

    def _trips(self, attributes: str) -> int | None:
        """Trips of a while: what the compiler noted, or what a `counter < constant` condition allows, from 0."""
        if match := _TRIPS.search(attributes):
            return int(match[1])
        condition = re.search(r"\bcondition=%?([\w.\-]+)", attributes)
        lines = list(self.computations.get(condition[1], {}).values()) if condition else []
        bounds = [number for line in lines if (number := _number(line)) is not None]
        compares = [line for line in lines if " compare(" in line and "direction=LT" in line]
        if len(bounds) != 1 or len(compares) != 1 or len(lines) > 5:
            return None
        places = [m[1] for line in lines if (m := re.search(r" get-tuple-element\(.*\bindex=(\d+)", line))]
        body = self.computations.get(_callees(attributes)["body"][0], {})
        return -(-bounds[0] // (_stride(body, int(places[0])) if len(places) == 1 else 1))

    def _groups(self, attributes: str) -> tuple[tuple[int, ...], ...]:
        """Replica groups in any of the three forms that XLA prints; empty means all devices."""
        start = attributes.find("replica_groups=")
        text = attributes[start + len("replica_groups=") :] if start >= 0 else "{}"
        if text.startswith("mesh["):
            return _mesh_groups(text)
        if text.startswith("["):
            return _iota_groups(text)
        return _explicit(_braced(attributes, "replica_groups=")) or (tuple(range(self.num_devices)),)


def _op_name(attributes: str) -> str:
    match = re.search(r'op_name="([^"]*)"', attributes)
    return match[1] if match else ""


def _kernel_metadata(attributes: str) -> dict[str, str]:
    """What a kernel that moves data between devices says of it: collective (one of KINDS), replica_groups, bytes."""
    match = _KERNEL_SAYS.search(attributes)
    said = json.loads(match[1]) if match else {}
    return said if said.get("collective") in KINDS else {}


def _of_kernel(name: str, said: dict[str, str], attributes: str, count: int, known: bool) -> Collective:
    size, groups = int(said["bytes"]), tuple(map(tuple, json.loads(said["replica_groups"])))
    return Collective(
        kind=said["collective"],
        name=name,
        operand_bytes=size,
        result_bytes=size,
        groups=groups,
        count=count,
        trips_known=known,
        op_name=_op_name(attributes),
    )


def _number(definition: str) -> int | None:
    """The value of an integer constant."""
    match = re.match(r"[su](?:32|64)\[\]\S*\s+constant\((\d+)\)", definition)
    return int(match[1]) if match else None


def _stride(body: Mapping[str, str], place: int) -> int:
    """What a loop's body adds to the counter at `place` of its tuple: the partitioner's own loops, in which chunks of a
    matmul's operand travel around, take two steps at once. 1 where the body does not say."""
    tuples = [m[1] for line in body.values() if (m := re.search(r" tuple\((.*?)\)(?:,|$)", line))]
    counters = re.findall(r"%?([A-Za-z_][\w.\-]*)(?=,|$)", re.sub(r"/\*.*?\*/", "", tuples[-1])) if tuples else []
    added = re.search(r" add\((.*?)\)", body.get(counters[place], "")) if place < len(counters) else None
    names = re.findall(r"%?([A-Za-z_][\w.\-]*)", added[1]) if added else []
    return next((n for name in names if (n := _number(body.get(name, "")))), 1)


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}`: the named axes vary within a group.

    `'b':(2)2` is a part of axis b: of its size split as (2, 2, rest), the middle one.
    """
    match = re.match(r"mesh\[([^\]]*)\](?:,?\s*device_ids=\((\[[^)]*\)|[^)]*)\)?\))?\s*,?\s*\{([^}]*)\}", text)
    if match is None:
        raise ValueError(f"replica groups in an unknown form: {text[:80]!r}")
    mesh, devices, axes = match.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w./\-]+)'?=(\d+)", mesh)}
    total = math.prod(sizes.values())
    ids = np.arange(total)
    if devices and devices.startswith("["):
        ids = np.array(_iota(devices if "<=" in devices else devices.replace("[", f"[{total}]<=[", 1))).reshape(-1)
    elif devices:
        ids = np.array([int(d) for d in devices.split(",")])
    parts: list[tuple[str, int, int]] = []  # (axis, its own size before, size) of each named axis
    for name, before, size in re.findall(r"'?([\w./\-]+)'?(?::\((\d+)\)(\d+))?", axes):
        parts.append((name, int(before or 1), int(size or sizes[name])))
    shape: list[int] = []
    varying: list[int] = []
    for name, size in sizes.items():
        cuts = sorted((before, width) for axis, before, width in parts if axis == name)
        done = 1
        for before, width in cuts:
            shape += [before // done, width]
            varying.append(len(shape) - 1)
            done = before * width
        shape.append(size // done)
    fixed = [i for i in range(len(shape)) if i not in varying]
    groups = ids.reshape(shape).transpose(fixed + varying)
    return tuple(map(tuple, groups.reshape(-1, math.prod(shape[i] for i in varying)).tolist()))


def _iota_groups(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, _iota(text).tolist()))


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: count up in shape [4,2], transpose, read in shape [2,4]."""
    match = re.match(r"\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", text)
    if match is None:
        raise ValueError(f"an iota device list in an unknown form: {text[:80]!r}")
    shape, reshape, permutation = ([int(n) for n in part.split(",")] if part else [] for part in match.groups())
    ids = np.arange(math.prod(reshape)).reshape(reshape)
    return (ids.transpose(permutation) if permutation else ids).reshape(shape)


def _explicit(text: str) -> tuple[tuple[int, ...], ...]:
    """`{{0,1},{2,3}}`; `{}` is empty."""
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def _braced(text: str, key: str) -> str:
    """The balanced {...} after `key`, or the empty string."""
    start = text.find(key)
    return text[start + len(key) : _close(text, start + len(key)) + 1] if start >= 0 else ""


def _close(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[(){}\[\]]").finditer(text, start):
        depth += 1 if match[0] in "({[" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets in {text[start : start + 60]!r}")


def _type_end(rest: str) -> int:
    """Index of the end of the result type that begins an instruction's text."""
    return _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")


def _split(rest: str) -> tuple[str, list[str], str]:
    """(opcode, operands, attributes) of `f32[8]{0} add(%a, %b), metadata={...}`."""
    match = _OPCODE.match(rest, _type_end(rest) + 1)
    if match is None:
        return "", [], ""
    end = _close(rest, match.end() - 1)
    operands, depth, word = [], 0, ""
    for ch in rest[match.end() : end] if match[1].removesuffix("-start") in KINDS else "":
        depth += (ch in "({[") - (ch in ")}]")
        if ch == "," and depth == 0:
            operands.append(word)
            word = ""
        else:
            word += ch
    return match[1], [o for o in [*operands, word] if o.strip()], rest[end + 1 :]


def _callees(attributes: str) -> dict[str, list[str]]:
    return {
        key: [n.strip().lstrip("%") for n in value.strip("{}").split(",")]
        for key, value in _CALLEES.findall(attributes)
    }


def _shape_bytes(text: str) -> int:
    """Bytes of all array types in `text`, tuples included."""
    total = 0
    for dtype, dims in _SHAPE.findall(text):
        bits = _bits(dtype)
        total += -(-bits * math.prod(int(d.strip("<=? ")) for d in dims.split(",") if d.strip()) // 8)
    return total


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return {"pred": 8}.get(dtype, 0)
    if _FLOAT8.fullmatch(dtype):
        return 8
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    if match is None:
        raise ValueError(f"the HLO element type {dtype!r} is not known")
    return int(match[1])
