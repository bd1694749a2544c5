"""Reads the text of an optimised HLO module: computations, instructions, shapes, trip counts.

XLA's own cost analysis counts the body of a loop once; with the instructions and the number of
trips at hand it can be counted as often as it runs. Format: openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

_BYTES = {
    "pred": 1,
    "s2": 0.25,
    "u2": 0.25,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
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
    """Memory space of the layout: 0 is the device's main memory, others are on the chip."""

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without the layout's padding; 0 for tokens and other things that are no array."""
        width = 1 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0)
        return math.ceil(self.elements * width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    """One array, or those of a tuple, nested ones in a row."""
    operands: tuple[str, ...]
    literal: str
    """What stands in the parentheses: a constant's value, a parameter's number."""
    attributes: str
    """The rest of the line."""

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations under an attribute: `calls`, `body`, `branch_computations`."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return tuple(_NAME.findall(found.group(1))) if found else ()

    def number(self, key: str) -> int | None:
        """A whole number under an attribute or a key of the backend's configuration."""
        found = re.search(rf"\b{key}\"?[=:]\s*\"?(-?\d+)", self.attributes)
        return int(found.group(1)) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order; the root is the result."""

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
    """`compiled.as_text()` -> Module.

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
    # Operands may have their shapes before their names and comments between them.
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
"""Number of a parameter's tuple element (or of a fusion's parameter) -> its constant value."""


def _unknown(_: int) -> int | None:
    return None


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation as it is called from somewhere: what is known of its parameter's values."""

    computation: Computation
    elements: Values = _unknown
    """Of a parameter that is a tuple: the constant that each element holds in every trip."""

    def constant(self, name: str) -> int | None:
        """The whole number that an instruction always gives; None when that cannot be told."""
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
        """The constant in one element of a tuple."""
        source = self.computation.instructions[name]
        return self.constant(source.operands[index]) if source.opcode == "tuple" else None


def loop_frame(module: Module, loop: Instruction, frame: Frame) -> Frame:
    """The frame of a while loop's body: elements that no trip changes keep what they began with."""
    body = module.computations[loop.called("body")[0]]

    def element(index: int) -> int | None:
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return None
        if _element_of_parameter(body, body.root.operands[index]) != index:
            return None
        return frame.tuple_element(loop.operands[0], index)

    return Frame(body, element)


def _element_of_parameter(computation: Computation, name: str) -> int | None:
    """The index when an instruction is an element of the computation's tuple, copied or not."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    if computation.instructions[instruction.operands[0]].opcode != "parameter":
        return None
    return instruction.number("index")


def trip_count(module: Module, loop: Instruction, frame: Frame) -> int | None:
    """How often a while loop's body runs; None when the text does not tell.

    A backend may have written it down; otherwise it follows from a counter: its first value, its
    step in the body, and the constant that the condition compares it with.
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
    """(element of the loop's tuple, limit, direction) as the condition's root compares them."""
    root, names, values = _unfused(module, Frame(condition, body.elements), condition.root)
    if root.opcode != "compare":
        return
    direction = re.search(r"direction=(\w+)", root.attributes)
    assert direction is not None
    mirrored = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    told = direction.group(1)
    left, right = root.operands
    for counter, limit, sense in ((left, right, told), (right, left, mirrored.get(told, told))):
        index = _element_of_parameter(condition, names.get(counter, counter))
        value = values.constant(limit)
        if index is not None and value is not None:
            yield index, value, sense


def _unfused(
    module: Module, frame: Frame, instruction: Instruction
) -> tuple[Instruction, dict[str, str], Frame]:
    """What a fusion computes, what its parameters are called outside, and their values."""
    if instruction.opcode != "fusion":
        return instruction, {}, frame
    inner = module.computations[instruction.called("calls")[0]]
    names = {name: instruction.operands[number] for number, name in inner.parameters.items()}
    return (
        inner.root,
        names,
        Frame(inner, lambda number: frame.constant(instruction.operands[number])),
    )


def _step(module: Module, body: Frame, counter: int) -> int | None:
    """What each trip adds to an element of the loop's tuple."""
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
