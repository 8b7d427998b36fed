"""Patches that keep signatures and can be taken back exactly.

Frameworks are patched by more than one party. Taking a patch back by popping the outermost wrapper
would remove somebody else's, so a patch that is no longer on top stays where it is and goes inert:
it then calls straight through to what it wraps.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from mmguard_plugins.errors import AdapterError

Wrapper = Callable[..., Any]
T = TypeVar("T")

_ABSENT = object()


class PatchSet:
    """Patches that come and go together; `undo` takes them back in reverse order.

    After `undo`, everything patched has the very attributes and class it had before, except where
    someone else patched on top: there our wrapper stays and does nothing.
    """

    def __init__(self) -> None:
        """Start without patches."""
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, wrapper: Wrapper) -> None:
        """Put `wrapper(original, *args, **kwargs)` in place of the callable `owner.name`.

        `owner` is an instance, a class or a module. Only its own attribute changes, never one it
        inherits; the signature stays.
        """
        before = vars(owner).get(name, _ABSENT)
        raw = inspect.getattr_static(owner, name)
        original = raw.__func__ if isinstance(raw, staticmethod | classmethod) else None
        gate = _Gate(original if original is not None else getattr(owner, name), wrapper)
        wrapped: Any = gate.function
        if inspect.isclass(owner) and original is not None:
            wrapped = type(raw)(wrapped)
        setattr(owner, name, wrapped)

        def undo() -> None:
            gate.active = False
            if vars(owner).get(name) is not wrapped:
                return  # someone wrapped us
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def retype(self, instance: Any, methods: Mapping[str, Wrapper], state: Any) -> None:
        """Give one instance a class of its own whose methods call `wrapper(original, self, ...)`.

        The way for methods that Python looks up on the type (`__call__`) and for instances that are
        copied: a copy takes the class along and is bound to itself, where a wrapper stored in the
        instance would go on calling the first one. `instance.__dict__` stays as it is. The new
        class has the old one's names, since frameworks look models up by class name.
        """
        before = type(instance)
        patched = _subclass(before, methods, state)
        instance.__class__ = patched
        self._undo.append(functools.partial(restore_type, instance, patched))

    def undo(self) -> None:
        """Take every patch back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        """Patch inside a `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the patches back at the end of the block."""
        self.undo()


def state_of(instance: Any, kind: type[T]) -> T | None:
    """Return the state that `retype` gave to `instance`, if it still acts and is of this kind."""
    for patched in type(instance).__mro__:
        if "_mmguard_state" in vars(patched):
            if instance in vars(patched)["_mmguard_inert"]:
                return None
            state = vars(patched)["_mmguard_state"]
            return state if isinstance(state, kind) else None
    return None


def restore_type(instance: Any, patched: type | None = None) -> None:
    """Give `instance` (or a copy of it) the class back that it had before `retype`."""
    if patched is None:
        marked = (k for k in type(instance).__mro__ if "_mmguard_state" in vars(k))
        patched = next(marked, None)
    if patched is None:
        return
    if type(instance) is patched:
        instance.__class__ = patched.__bases__[0]
    else:
        vars(patched)["_mmguard_inert"].add(instance)


class _Gate:
    """A wrapper that can be switched off without being taken away."""

    def __init__(self, original: Callable[..., Any], wrapper: Wrapper) -> None:
        self.active = True
        self.function: Callable[..., Any]

        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def later(*args: Any, **kwargs: Any) -> Any:
                call = functools.partial(wrapper, original) if self.active else original
                return await call(*args, **kwargs)

            self.function = later

        else:

            @functools.wraps(original)
            def now(*args: Any, **kwargs: Any) -> Any:
                call = functools.partial(wrapper, original) if self.active else original
                return call(*args, **kwargs)

            self.function = now


def _subclass(base: type, methods: Mapping[str, Wrapper], state: Any) -> type:
    inert: weakref.WeakSet[Any] = weakref.WeakSet()
    namespace: dict[str, Any] = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_mmguard_state": state,
        "_mmguard_inert": inert,
    }
    patched = type(base)(base.__name__, (base,), namespace)
    for name, wrapper in methods.items():
        if not hasattr(base, name):
            raise AdapterError(f"{base.__name__} has no {name!r}; it cannot be patched there")
        setattr(patched, name, _method(patched, name, getattr(base, name), wrapper, inert))
    return patched


def _method(
    patched: type, name: str, unbound: Any, wrapper: Wrapper, inert: weakref.WeakSet[Any]
) -> Callable[..., Any]:
    @functools.wraps(unbound)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(super(patched, self), name)
        if self in inert:
            return original(*args, **kwargs)
        return wrapper(original, self, *args, **kwargs)

    return method
