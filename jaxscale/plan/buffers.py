"""What a compiled program holds at its fullest moment, and the source lines that made it, from its scheduled text.

held = held_at_peak(compiled.as_text())
held.table()  # the largest first, each with its source line

The text is in the order of execution, on TPU and GPU. Buffers live from the instruction that makes them to the last
one that reads them or a view of them; loops update what they carry in place. The compiler's own assignment can differ:
it packs buffers, and on GPU it does not print it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxscale.table import Table, human_bytes


class Buffer(NamedTuple):
    """An array that the program holds beside its arguments."""

    name: str  # of the instruction
    type: str
    bytes: int  # with the padding of its layout
    op_name: str  # "jit(step)/transpose(jvp(mlp))/dot_general"
    source: str  # "jaxscale/models/decoder.py:244"


class Held(NamedTuple):
    """The fullest moment of a program."""

    at: str  # the instruction
    buffers: tuple[Buffer, ...]  # largest first

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.buffers)

    def table(self, most: int = 20) -> Table:
        rows = [(human_bytes(b.bytes), b.type, b.source, b.op_name) for b in self.buffers[:most]]
        title = f"Held at the fullest moment beside the arguments: {human_bytes(self.bytes)}, at {self.at}"
        return Table(title, ("bytes", "array", "source", "operation"), rows)


def held_at_peak(hlo_text: str) -> Held:
    """The buffers that are live when the sum of their bytes is largest.

    Args:
      hlo_text: Compiled.as_text() of a scheduled program.

    Raises:
      ValueError: the text holds no entry computation.
    """
    program = _Program(hlo_text)
    at, names = program.peak(program.entry)
    buffers = [program.buffer(computation, name, index) for computation, name, index in names]
    return Held(at, tuple(sorted(buffers, key=lambda b: -b.bytes)))


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


Slot = tuple[str, str, int]  # computation, instruction, element of its result
Slots = list[set[Slot]]  # for each element of a result the buffers that it may lie in

# Results that are views of operands, or live outside of the devices' memory.
_VIEWS = frozenset(["bitcast", "optimization-barrier", "copy-done", "after-all", "reshape-view"])
_LINE = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        self.peaks: dict[str, tuple[str, list[Slot]]] = {}
        self.writers: dict[Slot, _Instruction] = {}  # of what a loop carries: who rewrites it there
        body: list[_Instruction] | None = None
        for line in text.splitlines():
            if body is None:
                if match := _HEADER.match(line):
                    body = self.computations[match[2]] = []
                    self.entry = match[2] if match[1] else self.entry
            elif line.startswith("}"):
                body = None
            elif match := _LINE.match(line):
                body.append(_instruction(match[1], line[match.end() :]))
        if not self.entry:
            raise ValueError("no ENTRY computation in the text; pass the text of a program, compiled.as_text()")
        self.named = {c: {i.name: i for i in body} for c, body in self.computations.items()}
        self.frames = _frames(text)
        self.donated = self._donated(text[: text.find("\n")])

    def peak(self, computation: str) -> tuple[str, list[Slot]]:
        """Where a computation holds most beside what it was given, and what."""
        if computation in self.peaks:
            return self.peaks[computation]
        body = self.computations.get(computation, [])
        lies: dict[str, Slots] = {}  # where the result of each instruction lies
        last: dict[Slot, int] = {}
        born: dict[Slot, int] = {}
        for i, ins in enumerate(body):
            lies[ins.name] = self._lie(computation, ins, lies)
            for slots in [lies[ins.name], *(lies.get(o, []) for o in ins.operands)]:
                for slot in set().union(*slots) - self.donated:
                    last[slot] = i
                    born.setdefault(slot, i)
        dies: dict[int, list[Slot]] = {}
        for slot, i in last.items():
            dies.setdefault(i, []).append(slot)
        begins: dict[int, list[Slot]] = {}
        for slot, i in born.items():
            begins.setdefault(i, []).append(slot)
        live: set[Slot] = set()
        size, most, where, held = 0, -1, computation, []
        for i, ins in enumerate(body):
            for slot in begins.get(i, ()):
                live.add(slot)
                size += self._bytes(slot)
            inner_at, inner = self._inner(ins)
            total = size + sum(self._bytes(s) for s in inner)
            if total > most:
                most, where, held = total, inner_at or ins.name, [*live, *inner]
            for slot in dies.get(i, ()):
                live.discard(slot)
                size -= self._bytes(slot)
        self.peaks[computation] = where, held
        return self.peaks[computation]

    def buffer(self, computation: str, name: str, index: int) -> Buffer:
        ins = self.named[computation][name]
        writer = self.writers.get((computation, name, index))
        if writer is not None and not self._source(ins.attributes):  # zeros, or a copy: what fills them says more
            ins = ins._replace(attributes=writer.attributes)
        op = re.search(r'op_name="([^"]*)"', ins.attributes)
        array = _elements(ins.type)[index]
        return Buffer(
            f"{name}[{index}]" if ins.type.startswith("(") else name,
            re.sub(r"\{.*", "", array),
            _array_bytes(array),
            op[1] if op else ins.opcode,
            self._source(ins.attributes),
        )

    def _source(self, attributes: str) -> str:
        if match := re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes):
            return f"{_short(match[1])}:{match[2]}"
        match = re.search(r"stack_frame_id=(\d+)", attributes)
        return self.frames.get(int(match[1]), "") if match else ""

    def _donated(self, header: str) -> set[Slot]:
        """Results that are written over arguments: the operands of the entry's last tuple that the header names."""
        match = re.search(r"input_output_alias=\{((?:[^{}]|\{[^{}]*\})*)\}", header)
        outputs = {int(n or 0) for n in re.findall(r"\{(\d*)\}: \(", match[1])} if match else set()
        body = self.computations[self.entry]
        named, found = self.named[self.entry], set()
        for i, name in enumerate(body[-1].operands if body[-1].opcode == "tuple" else ()):
            ins, index = named.get(name), 0
            while ins is not None and ins.opcode in ("bitcast", "get-tuple-element", "copy-done"):
                at = re.search(r"index=(\d+)", ins.attributes)
                index, ins = int(at[1]) if at else 0, named.get(ins.operands[0])
            if i in outputs and ins is not None:
                found.add((self.entry, ins.name, index))
        return found

    def _inner(self, ins: _Instruction) -> tuple[str, list[Slot]]:
        """The fullest moment inside of a loop or a branch, beside what it carries."""
        if ins.opcode not in ("while", "conditional", "call", "async-start"):
            return "", []
        found = [self.peak(name) for name in _callees(ins)]
        return max(found, key=lambda f: sum(self._bytes(s) for s in f[1]), default=("", []))

    def _lie(self, computation: str, ins: _Instruction, lies: dict[str, Slots]) -> Slots:
        given = [lies.get(o, [set()]) for o in ins.operands]
        elements = _elements(ins.type)
        fresh: Slots = [{(computation, ins.name, i)} for i in range(len(elements))]
        opcode = ins.opcode
        if opcode in ("parameter", "constant", "partition-id", "replica-id", "iota"):
            return [set() for _ in elements]
        if opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", ins.attributes)[1])  # type: ignore[index]
            return [given[0][index]] if given and index < len(given[0]) else [set()]
        if opcode == "tuple":
            return [set().union(*slots) for slots in given]
        if opcode == "while":
            self._note_writers(ins, given[0])
            return given[0]
        if opcode in _VIEWS:
            return given[0][:1] if given else [set()]
        if opcode in ("dynamic-update-slice", "scatter"):
            return given[0]
        if opcode.endswith("-done"):
            read, made = _started(self.named[computation][ins.operands[0]].type)
            return given[0][read : read + made]
        if opcode == "copy-start":
            return [fresh[0], set().union(*given[0]), set()]
        if opcode.endswith("-update") and len(given[0]) == len(elements):
            return given[0]
        if opcode.endswith(("-start", "-update")) and ins.type.startswith("("):  # libtpu gives some theirs in an update
            held = set().union(*(s for slots in given for s in slots))
            read, made = _started(ins.type)
            rest = len(elements) - read - made
            return [*(set(held) for _ in range(read)), *fresh[read : read + made], *(set() for _ in range(rest))]
        if opcode == "fusion":
            return self._fused(ins, given, fresh)
        if opcode in ("custom-call",) and (pairs := re.findall(r"\{(\d*)\}: \((\d+), ", ins.attributes)):
            for out, operand in pairs:  # output_to_operand_aliasing
                if int(operand) < len(given):
                    fresh[int(out or 0)] = set().union(*given[int(operand)])
        return fresh

    def _note_writers(self, loop: _Instruction, carried: Slots) -> None:
        for name in _callees(loop):
            root = self.computations.get(name, [])[-1:]
            for slots, operand in zip(carried, root[0].operands if root and root[0].opcode == "tuple" else ()):
                ins = self.named[name].get(operand)
                if ins is not None and ins.opcode not in ("get-tuple-element", "parameter", "copy"):
                    self.writers.update((slot, ins) for slot in slots if slot not in self.writers)

    def _fused(self, ins: _Instruction, given: list[Slots], fresh: Slots) -> Slots:
        """A fusion whose result is an operand with a part rewritten works in place."""
        (called,) = _callees(ins) or ("",)
        named = self.named.get(called, {})
        if not named:
            return fresh
        body = self.computations[called]
        root = body[-1]
        outs = root.operands if root.opcode == "tuple" else (root.name,)
        for i, name in enumerate(outs[: len(fresh)]):
            while name in named and named[name].opcode in ("bitcast", "dynamic-update-slice", "convert"):
                if named[name].opcode == "convert":
                    break
                updated = named[name].opcode == "dynamic-update-slice"
                name = named[name].operands[0]
                while name in named and named[name].opcode == "bitcast":
                    name = named[name].operands[0]
                if updated and name in named and named[name].opcode == "parameter":
                    number = int(named[name].attributes or 0)
                    if number < len(given):
                        fresh[i] = set().union(*given[number])
                    break
        return fresh

    def _bytes(self, slot: Slot) -> int:
        computation, name, index = slot
        return _array_bytes(_elements(self.named[computation][name].type)[index])


def _instruction(name: str, rest: str) -> _Instruction:
    end = _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _close("(" + rest, 0) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    if opcode == "parameter":
        return _Instruction(name, kind, opcode, (), inside)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        part.split()[-1] for part in inside.split(",") if part.strip()
    )
    return _Instruction(name, kind, opcode, operands if opcode != "constant" else (), attributes)


def _close(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets in {text[start : start + 60]!r}")


def _callees(ins: _Instruction) -> list[str]:
    key = r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", ins.attributes)
    found = [n.strip().lstrip("%") for n in branches[1].split(",")] if branches else []
    return found + re.findall(key, ins.attributes)


def _elements(kind: str) -> list[str]:
    """The arrays of a type, in order: "(f32[2], s32[])" -> ["f32[2]", "s32[]"]. Inner tuples are flattened."""
    cached = _ELEMENTS.get(kind)
    if cached is None:
        cached = _ELEMENTS[kind] = [m[0] for m in _ARRAY.finditer(kind)] or [kind]
    return cached


_ELEMENTS: dict[str, list[str]] = {}


def _started(kind: str) -> tuple[int, int]:
    """How many arrays an asynchronous operation reads, and how many it makes: the first two of its type, either of
    which may be a tuple, also an empty one."""
    counts, depth = [], 0
    for match in re.finditer(rf"[()]|{_ARRAY.pattern}", kind):
        if match[0] in "()":
            depth += 1 if match[0] == "(" else -1
            counts += [0] * (match[0] == "(" and depth == 2)
        elif depth == 1:
            counts.append(1)
        else:
            counts[-1] += 1
    return counts[0], counts[1]


def _array_bytes(array: str) -> int:
    """Bytes in the device's main memory, padded as the layout's tiles say; what a cache holds (S(1)) is nothing."""
    match = _ARRAY.match(array)
    if match is None:
        return 0
    dtype, dims, layout = match[1], [int(d) for d in match[2].split(",") if d], match[3] or ""
    if re.search(r"S\([1-9]\d*\)", layout):
        return 0
    order, _, tiles = layout.partition(":")
    minor_first = [int(d) for d in order.split(",") if d] or list(reversed(range(len(dims))))
    if (tile := re.match(r"T\(([\d,]+)\)", tiles)) and dims:
        for size, dim in zip(reversed([int(t) for t in tile[1].split(",")]), minor_first):
            dims[dim] = -(-dims[dim] // size) * size
    width = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(width[0]) if width else 0
    return math.prod(dims) * bits // 8


def _frames(text: str) -> dict[int, str]:
    """stack_frame_id -> "file:line", from the tables at the head of the text."""

    def rows(title: str) -> Iterator[tuple[int, str]]:
        match = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        for line in match[1].splitlines() if match else ():
            number, _, rest = line.partition(" ")
            yield int(number), rest

    files = {n: _short(name.strip('"')) for n, name in rows("FileNames")}
    places = {}
    for n, row in rows("FileLocations"):
        found = dict(re.findall(r"(\w+)=(\d+)", row))
        places[n] = f"{files.get(int(found['file_name_id']), '')}:{found['line']}"
    frames = {}
    for n, row in rows("StackFrames"):
        found = dict(re.findall(r"(\w+)=(\d+)", row))
        frames[n] = places.get(int(found["file_location_id"]), "")
    return frames


def _short(path: str) -> str:
    """The last three parts of a path: enough to know it, and nothing of the machine."""
    return "/".join(path.split("/")[-3:])
