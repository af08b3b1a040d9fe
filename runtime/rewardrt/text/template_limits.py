"""The sandbox of chat templates, with limits on the time and memory of one rendering.

A chat template is a program from the bundle. Jinja has no unbounded loop, but nested loops, recursive macros and
expressions such as `'x' * 10**10` can take any amount of time or memory. So each rendering has a budget of steps (loop
iterations, calls, filters) and of characters (the size of every value that it builds). An operation that could build a
large value from small ones is checked before it runs. The limits are far above what a template needs for its
conversation.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 5_000_000
SIZE = 2**27  # characters that may be built; to these are added, for each character of the input:
SIZE_PER_INPUT = 64  # characters, and 2 more for each message
ITEM = 64  # characters that each item of a list or mapping counts as
SECONDS = 5.0  # CPU time of the rendering thread
LARGEST_NUMBER = 100_000  # largest argument that counts columns, characters, digits or parts
LARGEST_BITS = 100_000  # largest integer, in bits

_WIDTHS = ("center", "ljust", "rjust", "zfill", "expandtabs")
_COUNTING_FILTERS = ("center", "indent", "batch", "slice", "round", "wordwrap", "truncate", "tojson", "urlize")


class _Budget(threading.local):
    """What remains of the budget of the rendering that runs in this thread."""

    active = False
    steps = 0
    size = 0
    until = 0.0
    checked = 0


_left = _Budget()


class LimitedTemplate(Template):
    """A template whose every rendering has a budget of its own."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Render the template. Raises what Jinja raises, and SecurityError if the rendering exceeds its budget."""
        given = dict(*args, **kwargs)
        before = dict(_left.__dict__)
        messages = given.get("messages")
        share = SIZE_PER_INPUT + 2 * (len(messages) if isinstance(messages, list | tuple) else 0)
        _left.active = False  # measure the input without a limit
        size = SIZE + share * measure(given)
        _left.__dict__.update(active=True, steps=STEPS, size=size, until=time.thread_time() + SECONDS, checked=STEPS)
        try:
            return super().render(given)
        finally:
            _left.__dict__.clear()
            _left.__dict__.update(before)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with limits on time and memory; within the limits it renders the same text."""

    template_class = LimitedTemplate
    intercepted_binops = frozenset(("*", "**", "%", "+", "-"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, finalize=_made, **kwargs)
        self.filters = _Filters(self.filters)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        _Charging().visit(parsed)
        parsed.set_environment(self)
        return parsed

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply a binary operator, unless its result would be too large."""
        _charge(1)
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, str | list | tuple) and isinstance(other, int):
                _claim((measure(one) + 1) * max(0, other))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LARGEST_BITS:
                raise SecurityError(f"it computes a number of more than {LARGEST_BITS} bits")
        if operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls, unless its result would be too large."""
        _charge(1 + sum(len(value) for value in args if isinstance(value, list | tuple | dict | range)))
        if __obj is __self.globals.get("lipsum"):  # Jinja's generator of random text of any length
            _check_numbers([option * 1000 for option in (*args, *kwargs.values()) if isinstance(option, int)])
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps the format methods
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            _check_string_method(text, name, args, kwargs)
        if name == "join" and isinstance(text, str) and args:
            args = (_joined(args[0], text), *args[1:])
        return _made(super().call(__context, __obj, *args, **kwargs))


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, each wrapped with the limits, including filters that are added later."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__({name: _limited_filter(name, call) for name, call in filters.items()})
        self.update({"__made": pass_context(lambda _, value: _made(value)), "__items": _items, "__step": _step})

    def __setitem__(self, name: str, call: Callable[..., Any]) -> None:
        super().__setitem__(name, _limited_filter(name, call))


class _Charging(NodeTransformer):
    """Rewrite a template so that it charges for every loop iteration and for every value that it builds."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        line = node.lineno
        node.iter = _through(cast(nodes.Expr, node.iter), "__items")
        node.body.insert(0, nodes.ExprStmt(_through(nodes.Const(None, lineno=line), "__step"), lineno=line))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _through(node, "__made")

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _through(node, "__made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        plain = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else _through(node, "__made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(isinstance(pair.value, nodes.Const) for pair in node.items) else _through(node, "__made")


def _through(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def measure(value: Any) -> int:
    """Return the size of a value in characters, including nested values; stop early above the remaining budget."""
    if isinstance(value, str):
        return len(value)
    most = _left.size if _left.active else None
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            size += ITEM * len(item)
            waiting += [part for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            size += ITEM * len(item)
            waiting += item
        if most is not None and size > most:
            break
    return size


def _charge(steps: int) -> None:
    if not _left.active:
        return
    _left.steps -= steps
    if _left.steps < 0:
        raise SecurityError(f"it takes more than {STEPS} steps")
    if _left.checked - _left.steps >= 16:
        _left.checked = _left.steps
        if time.thread_time() > _left.until:
            raise SecurityError(f"it takes more than {SECONDS:g} seconds")


def _claim(size: int) -> None:
    """Raise SecurityError if a value of this size would exceed the budget; charge nothing."""
    if _left.active and size > _left.size:
        raise SecurityError("it makes too much text for the size of its input")


def _made(value: Any) -> Any:
    """Charge for a value that was built, and return it."""
    if _left.active and isinstance(value, str | bytes | list | tuple | Mapping):
        size = measure(value)
        _claim(size)
        _left.size -= size
    return value


@pass_context
def _items(_: Context, value: Any) -> Any:
    """Charge for the items that a loop goes over. The value stays as it is, so that `loop.length` and the like work."""
    if isinstance(value, list | tuple | dict | str | range):
        _charge(len(value))
    return value


@pass_context
def _step(_: Context, value: Any) -> Any:
    _charge(1)
    return value


def _limited_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    # Number of arguments that Jinja puts first: the context or the environment, or none.
    passed = 1 if getattr(call, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(call)
    def limited(*args: Any, **kwargs: Any) -> Any:
        value, options = args[passed] if len(args) > passed else None, [*args[passed + 1 :], *kwargs.values()]
        _charge(1 + (len(value) if isinstance(value, list | tuple | dict | range) else 0))
        if name == "indent" and isinstance(value, list):  # Jinja appends to it before it fails
            args = (*args[:passed], list(value), *args[passed + 1 :])
        if name in _COUNTING_FILTERS:
            _check_numbers(options)
        numbers = [option for option in options if isinstance(option, int)]
        words = [option for option in options if isinstance(option, str)]
        if name == "tojson":
            _claim(measure(value) * max([1, *numbers, *map(len, words)]))
        if isinstance(value, str):
            if name in ("indent", "wordwrap"):
                _claim(
                    (len(value) if name == "wordwrap" else value.count("\n") + 1) * max([0, *numbers, *map(len, words)])
                )
            if name == "replace":
                _check_string_method(value, name, tuple(options), {})
            if name == "format":
                _check_format(value, options)
        if name == "join":
            separator = next((option for option in options if isinstance(option, str)), "")
            args = (*args[:passed], _joined(value, separator), *args[passed + 1 :])
        return _made(call(*args, **kwargs))

    return limited


def _joined(value: Any, separator: str) -> Any:
    """Return the items to join as a list, unless joining them would build too much."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        _claim(measure(value) * (1 + len(separator)))
        return value
    items = list(itertools.islice(_counted(value), STEPS))
    _claim(measure(items) + len(items) * len(separator))
    return items


def _counted(items: Any) -> Iterator[Any]:
    for item in items:
        _charge(1)
        yield item


def _check_string_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    options = [*args, *kwargs.values()]
    if name in _WIDTHS:
        _check_numbers(options)
        if name == "expandtabs":
            _claim(len(text) + text.count("\t") * max([8, *(option for option in options if isinstance(option, int))]))
    elif name == "replace" and len(options) > 1 and isinstance(options[0], str) and isinstance(options[1], str):
        _claim(len(text) + text.count(options[0]) * len(options[1]))
    elif name in ("format", "format_map", "vformat"):
        _check_format(text, options)
    elif name == "translate":
        raise SecurityError("it calls translate, which makes any text of every character")


def _check_format(format: str, values: list[Any]) -> None:
    """Refuse a format with very wide fields, whether the width is a number in it or one of the values."""
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    if any(len(number) > 5 for number in re.findall(r"\d+", format)):
        raise SecurityError("it formats a field of 100000 characters or more")
    if "*" in format or re.search(r":[^{}]*\{", format):
        _check_numbers(flat)
    _claim(len(format) + (format.count("%") + format.count("{")) * max([0, *map(measure, values)]))


def _check_numbers(values: list[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > LARGEST_NUMBER:
            raise SecurityError(f"it asks for {value:g} of something; expected at most {LARGEST_NUMBER}")
