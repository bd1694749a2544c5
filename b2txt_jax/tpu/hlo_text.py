"""Parses the text of an optimised HLO module: computations, instructions, shapes, trip counts.

XLA's own cost analysis counts the body of a loop once. The parsed instructions and trip counts
allow counting it as often as it runs. Format: openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

_BYTES: dict[str, float] = {
    **dict.fromkeys(("s2", "u2"), 0.25),
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
_ARRAY = re.compile(r"(\w+)\[([\d,<=\s]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%?([\w.\-]+)")
_OPERAND = re.compile(r"%?([A-Za-z_][\w.\-]*)(?=\s*(?:,|$))")
_COMMENT = re.compile(r"/\*.*?\*/")
_LITERAL = ("constant", "parameter", "iota")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    """Memory space of the layout: 0 for the device's main memory, others are on the chip."""

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without the layout's padding. 0 for tokens and other values that are not arrays."""
        width = 1 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0)
        return math.ceil(self.elements * width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    """One array, or the arrays of a tuple, flattened."""
    operands: tuple[str, ...]
    literal: str
    """The text in the parentheses: a constant's value, a parameter's number."""
    attributes: str
    """The rest of the line."""

    def called(self, key: str) -> tuple[str, ...]:
        """Return the computations of an attribute: `calls`, `body`, `branch_computations`."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return tuple(_NAME.findall(found.group(1))) if found else ()

    def number(self, key: str) -> int | None:
        """Return the integer of an attribute or of a key of the backend's configuration."""
        found = re.search(rf"\b{key}\"?[=:]\s*\"?(-?\d+)", self.attributes)
        return int(found.group(1)) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order. The root is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @property
    def parameters(self) -> dict[int, str]:
        """Names by number."""
        return {
            int(found.literal): found.name
            for found in self.instructions.values()
            if found.opcode == "parameter"
        }


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program for one device."""

    computations: dict[str, Computation]
    entry: str


def parse_module(text: str) -> Module:
    """Parse `compiled.as_text()`.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, found, root = "", "", dict[str, Instruction](), ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, found, root = header.group(2), {}, ""
            entry = name if header.group(1) else entry
        elif line.startswith("}") and found:
            computations[name] = Computation(name, found, found[root])
        elif start := _INSTRUCTION.match(line):
            instruction = _parse_instruction(start.group(2), line[start.end() :])
            found[instruction.name] = instruction
            root = instruction.name if start.group(1) else root
    if not entry:
        raise ValueError("found no ENTRY computation; needed the text of an HLO module")
    return Module(computations, entry)


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    opcode = rest[:opening]
    # Operands may have shapes before their names, and comments between them.
    operands = () if opcode in _LITERAL else tuple(_OPERAND.findall(_COMMENT.sub("", inside)))
    return Instruction(name, opcode, _arrays(shape), operands, inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"found an unclosed parenthesis in {text[:200]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(size.strip(" <=")) for size in dims.split(",") if size),
            int(space.group(1)) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


Values = Callable[[int], "int | None"]
"""Maps the index of a tuple parameter's element, or of a fusion's parameter, to its constant."""


def _unknown(_: int) -> int | None:
    return None


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation with the known values of its parameters at one call."""

    computation: Computation
    elements: Values = _unknown
    """The constant that each element of a tuple parameter holds in every trip."""

    def constant(self, name: str) -> int | None:
        """Return the integer that an instruction always computes, or None if it is unknown."""
        instruction = self.computation.instructions.get(name)
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computation.instructions.get(instruction.operands[0])
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
        if instruction.opcode == "parameter":
            return self.elements(int(instruction.literal))
        if instruction.opcode == "get-tuple-element":
            source = self.computation.instructions[instruction.operands[0]]
            index = instruction.number("index")
            assert index is not None
            if source.opcode == "tuple":
                return self.constant(source.operands[index])
            if source.opcode == "parameter":
                return self.elements(index)
        return None

    def tuple_element(self, name: str, index: int) -> int | None:
        """Return the constant in one element of a tuple."""
        source = self.computation.instructions[name]
        return self.constant(source.operands[index]) if source.opcode == "tuple" else None


def loop_frame(module: Module, loop: Instruction, frame: Frame) -> Frame:
    """Return the frame of a while loop's body. Elements that no trip changes are constants."""
    body = module.computations[loop.called("body")[0]]

    def element(index: int) -> int | None:
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return None
        if _element_of_parameter(body, body.root.operands[index]) != index:
            return None
        return frame.tuple_element(loop.operands[0], index)

    return Frame(body, element)


def _element_of_parameter(computation: Computation, name: str) -> int | None:
    """Return the index if an instruction is an element of the computation's tuple, or a copy."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    if computation.instructions[instruction.operands[0]].opcode != "parameter":
        return None
    return instruction.number("index")


def trip_count(module: Module, loop: Instruction, frame: Frame) -> int | None:
    """Return how often a while loop's body runs, or None if it is unknown.

    The backend may have recorded it. Otherwise it follows from a counter: its first value, its step
    in the body, and the constant that the condition compares it with.
    """
    known = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called("condition")[0]]
    inside = loop_frame(module, loop, frame)
    for counter, limit, direction in _comparisons(module, condition, inside):
        first = frame.tuple_element(loop.operands[0], counter)
        step = _step(module, inside, counter)
        if first is None or not step:
            continue
        distance = limit - first if step > 0 else first - limit
        if (step > 0) != (direction in ("LT", "LE")) and direction != "NE":
            continue
        distance += direction in ("LE", "GE")
        return max(0, math.ceil(distance / abs(step)))
    return None


def _comparisons(
    module: Module, condition: Computation, body: Frame
) -> Iterator[tuple[int, int, str]]:
    """Yield (element of the loop's tuple, limit, direction) of the condition's comparison."""
    root, names, values = _unfused(module, Frame(condition, body.elements), condition.root)
    if root.opcode != "compare":
        return
    direction = re.search(r"direction=(\w+)", root.attributes)
    assert direction is not None
    mirrored = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    written = direction.group(1)
    left, right = root.operands
    swapped = mirrored.get(written, written)
    for counter, limit, sense in ((left, right, written), (right, left, swapped)):
        index = _element_of_parameter(condition, names.get(counter, counter))
        value = values.constant(limit)
        if index is not None and value is not None:
            yield index, value, sense


def _unfused(
    module: Module, frame: Frame, instruction: Instruction
) -> tuple[Instruction, dict[str, str], Frame]:
    """Return a fusion's root, the outer names of its parameters, and their values."""
    if instruction.opcode != "fusion":
        return instruction, {}, frame
    inner = module.computations[instruction.called("calls")[0]]
    names = {name: instruction.operands[number] for number, name in inner.parameters.items()}
    values = Frame(inner, lambda number: frame.constant(instruction.operands[number]))
    return inner.root, names, values


def _step(module: Module, body: Frame, counter: int) -> int | None:
    """Return the increment of an element of the loop's tuple per trip, or None if unknown."""
    computation = body.computation
    if computation.root.opcode != "tuple":
        return None
    changed = computation.instructions[computation.root.operands[counter]]
    while changed.opcode in ("copy", "bitcast"):
        changed = computation.instructions[changed.operands[0]]
    changed, names, values = _unfused(module, body, changed)
    if changed.opcode not in ("add", "subtract"):
        return None
    left, right = changed.operands
    outside = [names.get(name, name) for name in (left, right)]
    if changed.opcode == "add" and _element_of_parameter(computation, outside[1]) == counter:
        (left, right), outside = (right, left), outside[::-1]
    if _element_of_parameter(computation, outside[0]) != counter:
        return None
    value = values.constant(right)
    return value if value is None or changed.opcode == "add" else -value
