"""Gates: where each layer's attention waits for its KV, and tells that it has read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from pie_vllm.errors import CopyError


class Gates(Protocol):
    """What stands at the gates: the transfer engine, or ``full_graphs.Capture``."""

    def before_write(self, layer: int) -> None:
        """Called when the layer is about to write its KV."""

    def before_attention(self, layer: int) -> None:
        """Called when the layer is about to read KV."""

    def after_attention(self, layer: int) -> None:
        """Called when the layer has read KV."""


class GateSwitch:
    """Connects all gates with the engine while a step with a plan runs.

    Attributes:
        engine: receiver of the gates' calls; None while no such step runs.
        failed: called with the error of a copy that failed. It sets ``engine`` to None, so that
            the pass goes on without gates: an error in the middle of a pass would leave requests
            without their tokens that the copy does not concern, and other ranks in a collective
            operation.
    """

    __slots__ = ("engine", "failed")

    def __init__(self, failed: Callable[[CopyError], None]) -> None:
        self.engine: Gates | None = None
        self.failed = failed


def before_write(switch: GateSwitch, layer: int) -> None:
    """Pass the gate ahead of a layer's KV write."""
    engine = switch.engine
    if engine is not None:
        try:
            engine.before_write(layer)
        except CopyError as error:
            switch.failed(error)


def around_read(
    switch: GateSwitch, layer: int, read: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call ``read``, a layer's attention, between the gates before and after it."""
    engine = switch.engine
    if engine is None:
        return read(*args, **kwargs)
    try:
        engine.before_attention(layer)
    except CopyError as error:
        switch.failed(error)
        return read(*args, **kwargs)
    result = read(*args, **kwargs)
    try:
        engine.after_attention(layer)
    except CopyError as error:
        switch.failed(error)
    return result


_classes: dict[type, type] = {}


def _gated(base: type[Any]) -> type[Any]:
    """The subclass of an attention implementation that passes the gates."""
    if base in _classes:
        return _classes[base]

    class Gated(base):
        _pie_layer: int
        _pie_switch: GateSwitch

        def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> Any:
            before_write(self._pie_switch, self._pie_layer)
            return super().do_kv_cache_update(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return around_read(self._pie_switch, self._pie_layer, super().forward, *args, **kwargs)

    Gated.__name__ = Gated.__qualname__ = "Pie" + base.__name__
    _classes[base] = Gated
    return Gated


def install(impl: Any, layer: int, switch: GateSwitch) -> None:
    """Put the gates of ``layer`` around an attention implementation, in place.

    The object's class becomes a subclass: a proxy would break vLLM's isinstance
    checks (v1/attention/backends/cpu_attn.py:192, flash_attn.py:576).
    """
    if not hasattr(impl, "_pie_switch"):
        impl.__class__ = _gated(type(impl))
    impl._pie_layer = layer
    impl._pie_switch = switch
