"""Times by stage."""

from __future__ import annotations

import threading
import time

import pytest

from semantic_anomaly.timing import stage_times, timed


def test_parts_of_a_stage_add_up() -> None:
    with timed("search"):
        pass
    with stage_times() as times_ms:
        for _ in range(2):
            with timed("search"):
                time.sleep(0.01)
        with pytest.raises(ValueError), timed("score"):
            raise ValueError
    with timed("search"):
        time.sleep(0.01)
    assert set(times_ms) == {"search", "score"}
    assert 20 <= times_ms["search"] < 1000 and times_ms["score"] < 10


def test_only_the_innermost_collection_of_the_same_thread_is_added_to() -> None:
    def other() -> None:
        with timed("elsewhere"):
            pass

    with stage_times() as outer_ms:
        with stage_times() as inner_ms, timed("inside"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        with timed("outside"):
            pass
    assert set(inner_ms) == {"inside"} and set(outer_ms) == {"outside"}
