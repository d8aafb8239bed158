"""One timer: it calls everyone in turn, survives their errors, and forgets who is gone."""

import gc
import threading
import time

from lab_utils.widgets._pulse import Handle, subscribe


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def pulses():
    return [thread for thread in threading.enumerate() if thread.name == "ascent-pulse"]


class View:
    def __init__(self):
        self.calls, self.threads = 0, set()

    def look(self):
        self.calls += 1
        self.threads.add(threading.current_thread().name)


def test_many_subscribers_share_one_thread_which_ends_with_the_last():
    views = [View() for _ in range(20)]
    handles = [subscribe(view.look, 0.01) for view in views]
    until(lambda: all(view.calls > 2 for view in views))
    assert len(pulses()) == 1 and pulses()[0].daemon
    assert {name for view in views for name in view.threads} == {"ascent-pulse"}
    for handle in handles:
        handle.cancel()
    until(lambda: not pulses())
    counts = [view.calls for view in views]
    time.sleep(0.05)
    assert [view.calls for view in views] == counts


def test_the_first_call_comes_at_once_and_the_next_when_it_is_due():
    view = View()
    handle = subscribe(view.look, 1000.0)
    until(lambda: view.calls == 1)
    time.sleep(0.05)
    assert view.calls == 1
    handle.soon()
    until(lambda: view.calls == 2)
    handle.cancel()


def test_an_error_is_the_subscribers_and_the_others_go_on():
    view, wrong = View(), []

    def fails():
        wrong.append(1)
        if len(wrong) < 3:
            raise ValueError("no")

    failing, fine = subscribe(fails, 0.01), subscribe(view.look, 0.01)
    until(lambda: failing.error is not None)
    assert isinstance(failing.error, ValueError)
    until(lambda: len(wrong) > 3 and view.calls > 3)
    until(lambda: failing.error is None)
    assert fine.error is None
    failing.cancel()
    fine.cancel()


def test_a_view_that_nobody_holds_is_dropped():
    views = [View()]
    handle = subscribe(views[0].look, 0.01)
    until(lambda: views[0].calls > 1)
    assert handle.alive
    views.clear()
    until(lambda: gc.collect() >= 0 and not handle.alive)
    until(lambda: not pulses())


def test_a_subscriber_may_cancel_itself_and_subscribe_again():
    calls = []

    def once():
        calls.append(1)
        (first if len(calls) == 1 else second).cancel()

    first = Handle(once, 0.01)
    second = first
    first.call()
    assert first.cancelled and not first.alive and calls == [1]
    first.call()
    assert calls == [1]
    second = subscribe(once, 0.01)
    until(lambda: len(calls) == 2 and not pulses())


def test_a_slow_subscriber_leaves_time_to_the_others_and_its_time_is_told():
    view = View()
    slow, quick = subscribe(lambda: time.sleep(0.03), 0.01), subscribe(view.look, 0.01)
    until(lambda: slow.spent.calls > 3)
    assert view.calls >= 3 and slow.spent.longest >= 0.03 and slow.spent.total >= 0.09
    slow.cancel()
    quick.cancel()
