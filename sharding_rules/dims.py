"""Dimension identity: which dims of which arrays must be split together.

A dim of an array is a tuple of atoms, major to minor; its size is the product of theirs. A fused H = N x h dim is
(N, h): only its leading atom can be split contiguously. Atoms that are found to be the same are united; an atom may
later turn out to be a product (a reshape splits it) or a concatenation of segments (a slice cuts it), and then every
array that holds it sees that. Dims of size 1 have no atoms.

Why this ends, whatever the program: parts and segments are strictly smaller than their atom (there are at least two of
each, none of them a factor of 1), so uniting two dims of size n splits each of their atoms at most log2(n) times, cuts
each at most n times, and otherwise only unites smaller dims.
"""

import itertools
import math
from collections.abc import Sequence

Dim = tuple["Atom", ...]


class Atom:
    """A node of the union-find forest. `parts` (product) and `segments` (concatenation) are set on roots only."""

    __slots__ = ("blocked", "loop", "order", "parent", "parts", "segments", "size")
    counter = itertools.count()

    def __init__(self, size: int):
        self.size = size
        self.parent: Atom | None = None
        self.parts: Dim | None = None
        self.segments: list[Dim] | None = None
        self.blocked = ""  # why nothing may split it; empty: it may be split
        self.loop = False  # the stacked dim that a loop walks
        self.order = next(Atom.counter)

    def __repr__(self):
        return f"{self.size}#{self.order}"


def fresh(size: int) -> Dim:
    return (Atom(int(size)),) if size != 1 else ()


def root(atom: Atom) -> Atom:
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def expand(dim: Dim) -> Dim:
    """The dim in roots that are not products."""
    out: list[Atom] = []
    for atom in dim:
        found = root(atom)
        if found.parts is not None:
            out.extend(expand(found.parts))
        else:
            out.append(found)
    return tuple(out)


def size_of(dim: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in dim)


def block(dim: Dim, why: str) -> None:
    for atom in expand(dim):
        atom.blocked = atom.blocked or why


def unify(a: Dim, b: Dim) -> None:
    """Makes two dims of one size the same, splitting atoms where their factors differ; blocks what cannot match."""
    left, right = list(expand(a)), list(expand(b))
    if size_of(left) == 0:
        return
    while left and right:
        x, y = root(left.pop()), root(right.pop())
        if x.parts is not None or y.parts is not None:  # split by an earlier step of this very loop
            left += expand((x,))
            right += expand((y,))
        elif x.size == y.size:
            _unite(x, y)
        elif x.size % y.size == 0 and split(x, y.size):
            left += expand((x,))
            right.append(y)
        elif y.size % x.size == 0 and split(y, x.size):
            right += expand((y,))
            left.append(x)
        else:
            block((*left, x, *right, y), f"sizes {x.size} and {y.size} meet without a common factoring")
            return


def split(atom: Atom, minor: int) -> bool:
    """Refines a root into (size / minor, minor); False where its segments forbid it."""
    assert 1 < minor < atom.size, (atom, minor)
    major, minor = atom.size // minor, int(minor)
    if atom.segments is None:
        parts = (Atom(major), Atom(minor))
    else:
        heads, tails = [], []
        for segment in atom.segments:
            head = list(expand(segment))
            tail = take(head, minor) if size_of(head) % minor == 0 else None
            if tail is None:
                sizes = [size_of(s) for s in atom.segments]
                block((atom,), f"segments of {sizes} cannot be regrouped by {minor}")
                return False
            heads.append(tuple(head))
            tails.append(tail)
        for tail in tails[1:]:
            unify(tails[0], tail)
        lead = Atom(major)
        lead.segments = heads
        parts = (lead, *expand(tails[0]))
    for part in parts:
        if part.blocked == "":
            part.blocked = atom.blocked
        part.loop = part.loop or atom.loop
    atom.parts, atom.segments = parts, None
    return True


def take(atoms: list[Atom], size: int) -> Dim | None:
    """Pops a dim of `size` off the minor end of `atoms`; None where the factors do not allow it."""
    taken: list[Atom] = []
    left = size
    while left > 1:
        if not atoms:
            return None
        atom = root(atoms.pop())
        if atom.parts is not None:
            atoms += expand((atom,))
        elif left % atom.size == 0:
            taken.insert(0, atom)
            left //= atom.size
        elif atom.size % left == 0 and split(atom, left):
            atoms += expand((atom,))
        else:
            return None
    return tuple(taken)


def concatenate(pieces: Sequence[Dim]) -> Dim:
    pieces = [p for p in pieces if size_of(p) > 0]
    if len(pieces) < 2:
        return pieces[0] if pieces else fresh(0)
    atom = Atom(sum(size_of(p) for p in pieces))
    if not any(nearly_whole(size_of(p), atom.size) for p in pieces):
        atom.segments = list(pieces)
    return (atom,)


def nearly_whole(part: int, size: int) -> bool:
    """A range that leaves out little is a shift, a halo or a class token: positions move, nothing is fused."""
    return size // 2 < part < size and 16 * part > 15 * size


def cut(dim: Dim, start: int, stop: int) -> Dim | None:
    """The dim of dim[start:stop]; None where the range does not follow the segments or factors that are known."""
    atoms = expand(dim)
    if start == 0 and stop == size_of(atoms):
        return dim
    if start == stop:
        return fresh(0)
    lead, rest = atoms[0], atoms[1:]
    inner = size_of(rest)
    if start % inner or stop % inner or nearly_whole(stop - start, inner * lead.size):
        return None
    start, stop = start // inner, stop // inner
    if start == 0 and stop == lead.size:
        return dim
    if lead.segments is None:
        lead.segments = [fresh(n) for n in (start, stop - start, lead.size - stop) if n]
    if not (_boundary(lead, start) and _boundary(lead, stop)):
        return None
    position, pieces = 0, []
    for segment in lead.segments:
        if start <= position < stop:
            pieces.append(segment)
        position += size_of(segment)
    return (*concatenate(pieces), *rest)


def _boundary(atom: Atom, at: int) -> bool:
    """Makes `at` a boundary between segments; only inside a segment that is one plain atom."""
    position = 0
    assert atom.segments is not None
    for i, segment in enumerate(atom.segments):
        if position == at:
            return True
        size = size_of(segment)
        if position < at < position + size:
            inner = expand(segment)
            if len(inner) != 1 or inner[0].segments is not None:
                return len(inner) == 1 and _boundary(inner[0], at - position) and _flatten(atom, i)
            inner[0].segments = [fresh(at - position), fresh(position + size - at)]
            return _flatten(atom, i)
        position += size
    return position == at


def _flatten(atom: Atom, i: int) -> bool:
    """Replaces segment i, itself segmented, by its segments."""
    assert atom.segments is not None
    (inner,) = expand(atom.segments[i])
    atom.segments[i : i + 1] = inner.segments or [(inner,)]
    return True


def _unite(x: Atom, y: Atom) -> None:
    if x is y:
        return
    if y.order < x.order:  # the older one stays, so that numbering follows the program
        x, y = y, x
    y.parent = x
    x.blocked = x.blocked or y.blocked
    x.loop = x.loop or y.loop
    if x.segments is None:
        x.segments = y.segments
    elif y.segments is not None:
        _unite_segments(x, y.segments)


def _unite_segments(x: Atom, others: list[Dim]) -> None:
    """Cuts both lists of segments where the other is cut, and unites them piece by piece."""
    y = Atom(x.size)
    y.segments = list(others)
    # One pass is not enough where they share atoms, as in [a|b] beside [b|a]: a cut in one may cut the other.
    while (a := _boundaries(x)) != (b := _boundaries(y)):
        for atom, missing in ((x, b - a), (y, a - b)):
            for at in sorted(missing):
                if not _boundary(atom, at):
                    x.blocked = x.blocked or "it is cut into segments in two ways"
                    return
    assert x.segments is not None
    for one, other in zip(list(x.segments), list(y.segments), strict=True):
        unify(one, other)


def _boundaries(atom: Atom) -> set[int]:
    assert atom.segments is not None
    return set(itertools.accumulate(map(size_of, atom.segments)))
