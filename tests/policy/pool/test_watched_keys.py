"""WatchedKeys: the first key that changed, and nothing of others."""

from __future__ import annotations

from pie_vllm.policy.pool.watched_keys import WatchedKeys


def watching(keys: str) -> WatchedKeys:
    """These keys, in two goes."""
    watched = WatchedKeys()
    watched.add(keys[:2])
    watched.add(keys[2:])
    return watched


def test_the_first_of_the_changed_keys_counts() -> None:
    """Whatever changed first in time; what is watched by nobody changes nothing."""
    watched = watching("abcd")
    watched.changed("x")
    assert (watched.first_changed, watched.cut()) == (None, [])
    for key in "dbc":
        watched.changed(key)
    assert watched.first_changed == 1
    assert watched.cut() == ["b", "c", "d"]
    assert (watched.first_changed, [*watched.places]) == (None, ["a"])


def test_keys_behind_a_cut_have_their_places_in_the_table() -> None:
    """What is looked up again is watched where it stands."""
    watched = watching("abcd")
    watched.changed("b")
    watched.cut()
    watched.add("bz")
    assert watched.places == {"a": 0, "b": 1, "z": 2}
    watched.changed("z")
    assert watched.first_changed == 2


def test_everything_may_change_at_once() -> None:
    """As where a cache is forgotten; without keys there is nothing to look up again."""
    watched = watching("abc")
    watched.all_changed()
    assert watched.cut() == ["a", "b", "c"]
    watched.all_changed()
    assert watched.first_changed is None
    watched.add("ab")
    watched.changed("a")
    watched.clear()
    assert (watched.first_changed, watched.places) == (None, {})
