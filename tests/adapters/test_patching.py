from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from mmguard_adapters.patching import PatchSet, restore_type, state_of
from mmguard_plugins import AdapterError


class Thing:
    def __init__(self, number: int = 1) -> None:
        self.number = number

    def add(self, more: int, *, twice: bool = False) -> int:
        """Add."""
        return self.number + more * (1 + twice)

    def __call__(self) -> str:
        return "called"

    @classmethod
    def make(cls, number: int) -> Thing:
        return cls(number)

    @staticmethod
    def constant() -> int:
        return 7

    async def wait(self) -> int:
        return self.number


class State:
    pass


def plus_hundred(original: Any, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs) + 100


def loud(original: Any, _: Any) -> str:
    return str(original()).upper()


def test_an_instance_is_patched_and_restored() -> None:
    thing, other, before = Thing(), Thing(), dict(vars(Thing()))
    with PatchSet() as patches:
        patches.replace(thing, "add", plus_hundred)
        assert (thing.add(1), other.add(1)) == (102, 2)
    assert thing.add(1) == 2
    assert vars(thing) == before


def test_a_class_is_patched_and_restored() -> None:
    before = dict(vars(Thing))
    patches = PatchSet()
    patches.replace(Thing, "add", plus_hundred)
    patches.replace(Thing, "constant", plus_hundred)
    patches.replace(Thing, "make", lambda original, cls, number: original(cls, number * 2))
    assert Thing(1).add(1, twice=True) == 103
    assert Thing.constant() == Thing().constant() == 107
    assert Thing.make(2).number == 4
    patches.undo()
    patches.undo()
    assert dict(vars(Thing)) == before


def test_a_patch_keeps_the_signature() -> None:
    with PatchSet() as patches:
        expected = inspect.signature(Thing.add)
        patches.replace(Thing, "add", plus_hundred)
        patches.replace(Thing, "wait", plus_hundred)
        assert inspect.signature(Thing.add) == expected
        assert Thing.add.__doc__ == "Add."
        assert inspect.iscoroutinefunction(Thing.wait)


def test_a_wrapper_below_another_goes_inert() -> None:
    thing = Thing()
    ours, theirs = PatchSet(), PatchSet()
    ours.replace(thing, "add", plus_hundred)
    theirs.replace(thing, "add", lambda original, more: original(more) + 1000)
    assert thing.add(1) == 1102
    ours.undo()
    assert thing.add(1) == 1002
    theirs.undo()
    assert thing.add(1) == 2


def test_an_instance_gets_a_class_of_its_own() -> None:
    thing, other, state = Thing(), Thing(), State()
    patches = PatchSet()
    patches.retype(thing, {"__call__": loud}, state)
    assert (thing(), other()) == ("CALLED", "called")
    assert isinstance(thing, Thing)
    assert (type(thing).__name__, type(thing).__module__) == ("Thing", Thing.__module__)
    assert vars(thing) == {"number": 1}
    assert state_of(thing, State) is state
    assert state_of(other, State) is None
    patches.undo()
    assert type(thing) is Thing


def test_a_copy_is_patched_too_and_is_bound_to_itself() -> None:
    thing = Thing()
    patches = PatchSet()
    patches.retype(thing, {"add": lambda original, _, more: original(more) + 100}, State())
    clone = copy.deepcopy(thing)
    clone.number = 5
    assert (thing.add(1), clone.add(1)) == (102, 106)
    patches.undo()
    assert (thing.add(1), clone.add(1)) == (2, 106)
    restore_type(clone)
    assert type(clone) is Thing


def test_a_patched_instance_is_not_pickled_without_its_patch() -> None:
    thing = Thing()
    with PatchSet() as patches:
        patches.retype(thing, {"__call__": loud}, State())
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(thing)


def test_a_class_that_is_not_on_top_goes_inert() -> None:
    thing = Thing()
    patches = PatchSet()
    patches.retype(thing, {"__call__": loud}, State())
    on_top = type("OnTop", (type(thing),), {})
    thing.__class__ = on_top
    patches.undo()
    assert type(thing) is on_top
    assert thing() == "called"
    assert state_of(thing, State) is None


def test_a_method_that_is_not_there_cannot_be_patched() -> None:
    with pytest.raises(AdapterError, match="Thing has no 'nope'"):
        PatchSet().retype(Thing(), {"nope": loud}, State())
