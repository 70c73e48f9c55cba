"""How vLLM is patched, and which versions of it.

Each patch says which line of vLLM it relies on; the line is checked when the patch is made, and
a patch that no longer fits fails with a clear error instead of a wrong answer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import vllm
from packaging.version import Version

from pie_vllm.errors import UnsupportedError

SUPPORTED = (Version("0.32"), Version("0.34"))


def check_version(found: str | None = None) -> None:
    """Raise UnsupportedError unless the vLLM found is a supported one."""
    text = vllm.__version__ if found is None else found
    low, high = SUPPORTED
    if not low <= Version(Version(text).base_version) < high:
        raise UnsupportedError(
            f"--block-manager pie supports vLLM >={low},<{high}, found {text}. Install a "
            f"supported version (pip install 'vllm>={low},<{high}') or use "
            "--block-manager default."
        )


def expect(obj: Any, *fragments: str) -> None:
    """Raise UnsupportedError unless the source of ``obj`` has each fragment."""
    source = inspect.getsource(obj)
    for fragment in fragments:
        if fragment not in source:
            name = getattr(obj, "__qualname__", getattr(obj, "__name__", repr(obj)))
            raise UnsupportedError(
                f"vLLM {vllm.__version__}: {name} has no '{fragment}', which pie_vllm relies "
                "on. Use a supported vLLM version or --block-manager default."
            )


def expect_in_order(obj: Any, *fragments: str) -> None:
    """Raise UnsupportedError unless the source of ``obj`` has these fragments in this order."""
    source, end = inspect.getsource(obj), 0
    for fragment in fragments:
        begin = source.find(fragment, end)
        if begin < 0:
            name = getattr(obj, "__qualname__", repr(obj))
            raise UnsupportedError(
                f"vLLM {vllm.__version__}: {name} has no '{fragment}' after what pie_vllm expects "
                "before it. Use a supported vLLM version or --block-manager default."
            )
        end = begin + len(fragment)


_classes: dict[tuple[type, str], type] = {}


def call_before(target: Any, name: str, then: Callable[..., None]) -> None:
    """Call ``then`` with the arguments of one object's method before each call of that method.

    The object's class becomes a subclass, as for ``gate.install``: whoever looks the method up
    finds it, and calls of the base class are not touched.
    """
    base = type(target)
    key = (base, name)
    if key not in _classes:
        original = getattr(base, name)
        noted = f"_pie_before_{name}"

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            getattr(self, noted)(*args, **kwargs)
            return original(self, *args, **kwargs)

        _classes[key] = type("Pie" + base.__name__, (base,), {name: method})
    target.__class__ = _classes[key]
    setattr(target, f"_pie_before_{name}", then)


@contextmanager
def swapped(module: Any, name: str, value: Any, caller: Any, line: str) -> Iterator[None]:
    """Replace a module's global while a vLLM function that uses it runs.

    Args:
        module: the module whose global is replaced.
        name: the global.
        value: what it is meanwhile.
        caller: the vLLM function that looks the global up.
        line: what must stand in that function's source.
    """
    expect(caller, line)
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def wrapped_once(
    owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put ``wrap(method)`` in place of a method for good; a second call changes nothing."""
    original = getattr(owner, name)
    if not getattr(original, "pie", False):
        wrapped: Any = wrap(original)
        wrapped.pie = True
        setattr(owner, name, wrapped)
