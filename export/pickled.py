# SPDX-License-Identifier: Apache-2.0
"""What a pickle says, without doing it: nothing is imported, called or built but plain data and `Node`s.

The instructions are those that Python's pickler writes for data classes, by `pickletools`; any other is refused.
"""

import pickletools
from dataclasses import dataclass
from typing import IO, Any

_MOST = 50_000_000
"""Instructions; an index of a checkpoint has about 40 for each tensor."""


@dataclass(frozen=True)
class Name:
    """A class or function, by its name only."""

    module: str
    name: str


@dataclass(eq=False, kw_only=True)
class Node:
    """An object: what would be called, with what, and the state that it would be given."""

    kind: Name
    arguments: tuple[Any, ...]
    state: Any = None


class _Mark:
    """Where a list of values begins on the stack."""


def read_pickle(file: IO[bytes]) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, strings, numbers, None, `Name`s and `Node`s.

    Raises:
        ValueError: if it is cut short, or has instructions that are not known here.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST:
                raise ValueError(f"it has more than {_MOST} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its instructions contradict each other: {error!r}") from error
    raise ValueError("it has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif (act := getattr(self, f"_{name.lower()}", None)) is not None:
            act(argument)
        else:
            raise ValueError(f"it has the instruction {name}, which is not known here")

    def _mark(self, _: Any) -> None:
        self.stack.append(_Mark())

    def _since_mark(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if isinstance(value, _Mark))
        values, self.stack = self.stack[at + 1 :], self.stack[:at]
        return values

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _binput(self, number: int) -> None:
        self._memo[number] = self.stack[-1]

    _long_binput = _binput

    def _binget(self, number: int) -> None:
        self.stack.append(self._memo[number])

    _long_binget = _binget

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        self.stack[-1].extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][key] = value

    def _setitems(self, _: Any) -> None:
        values = self._since_mark()
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def _tuple(self, _: Any) -> None:
        values = self._since_mark()
        self.stack.append(tuple(values))

    def _take(self, count: int) -> None:
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(values))

    def _tuple1(self, _: Any) -> None:
        self._take(1)

    def _tuple2(self, _: Any) -> None:
        self._take(2)

    def _tuple3(self, _: Any) -> None:
        self._take(3)

    def _global(self, both: str) -> None:
        module, _, name = both.partition(" ")
        self.stack.append(Name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(module, name))

    def _newobj(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            raise ValueError("it makes an object of something that has no name")
        self.stack.append(Node(kind=kind, arguments=arguments))

    _reduce = _newobj

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Node):
            raise ValueError("it gives a state to something that is no object")
        self.stack[-1].state = state


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
