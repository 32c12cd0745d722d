"""The loop: order of events, preemption, and losses that are not finite."""

import itertools
import os
import signal

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxscale import Callback, fit, make_train_state, make_train_step
from jaxscale.train import NonFiniteLoss, Preempted


class Recorder(Callback):
    def __init__(self, every=1):
        self.every, self.events = every, []

    def on_start(self, step, steps):
        self.events.append(("start", step, steps))

    def on_metrics(self, step, metrics):
        self.events.append(("metrics", step))

    def on_state(self, step, state):
        assert int(state.step) == step
        self.events.append(("state", step))

    def on_preempt(self, step, state):
        assert int(state.step) == step
        self.events.append(("preempt", step))

    def on_end(self):
        self.events.append(("end",))


def loss(params, batch):
    return ((params["w"] - batch) ** 2).sum()


def start(learning_rate=0.1):
    optimizer = optax.sgd(learning_rate)
    state = make_train_state({"w": jnp.ones(3)}, optimizer, jax.random.key(0))
    return state, make_train_step(loss, optimizer)


def test_order_of_events():
    seen = Recorder(every=2)
    state = fit(*start(), itertools.repeat(jnp.zeros(3)), steps=5, callbacks=[seen])
    assert int(state.step) == 5
    assert [e for e in seen.events if e[0] == "metrics"] == [("metrics", i) for i in range(1, 6)]
    assert [e for e in seen.events if e[0] == "state"] == [("state", 2), ("state", 4), ("state", 5)]
    for step in (2, 4, 5):  # a state is shown only after its metrics were found finite
        assert seen.events.index(("metrics", step)) < seen.events.index(("state", step))
    assert seen.events[0] == ("start", 0, 5)
    assert seen.events[-1] == ("end",)


def test_what_a_callback_measures_reaches_the_others():
    class Measure(Callback):
        every = 3

        def on_state(self, step, state):
            return {"measured": step * 2.0}

    class Keep(Callback):
        def __init__(self):
            self.seen = []

        def on_metrics(self, step, metrics):
            if "measured" in metrics:
                self.seen.append((step, metrics["measured"]))

    keep = Keep()
    fit(*start(), itertools.repeat(jnp.zeros(3)), steps=6, callbacks=[keep, Measure()])
    assert keep.seen == [(3, 6.0), (6, 12.0)]


def test_nan_stops_before_anything_is_saved():
    bad = [jnp.zeros(3)] * 3 + [jnp.full(3, jnp.nan)] + [jnp.zeros(3)] * 6
    seen = Recorder()
    with pytest.raises(NonFiniteLoss, match="step 4: loss=nan"):
        fit(*start(), iter(bad), steps=10, callbacks=[seen])
    assert [e for e in seen.events if e[0] == "state"] == [("state", 1), ("state", 2), ("state", 3)]
    assert seen.events[-1] == ("end",)


def test_nan_is_seen_even_where_no_state_is_due():
    bad = [jnp.zeros(3)] * 3 + [jnp.full(3, jnp.inf)] + [jnp.zeros(3)] * 60
    with pytest.raises(NonFiniteLoss, match="step 4"):
        fit(*start(), iter(bad), steps=50, callbacks=[Recorder(every=100)])


def test_sigterm_saves_and_says_where():
    class Terminate(Callback):
        def on_metrics(self, step, metrics):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    seen, before = Recorder(every=100), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stop:
        fit(*start(), itertools.repeat(jnp.zeros(3)), steps=50, callbacks=[Terminate(), seen])
    assert ("preempt", stop.value.step) in seen.events
    assert 3 <= stop.value.step <= 5
    assert seen.events[-1] == ("end",)
    assert signal.getsignal(signal.SIGTERM) is before


def test_continues_where_the_state_stands():
    state, step = start()
    state = fit(state, step, itertools.repeat(jnp.zeros(3)), steps=2)
    seen = Recorder()
    fit(state, step, itertools.repeat(jnp.zeros(3)), steps=4, callbacks=[seen])
    assert [e for e in seen.events if e[0] == "metrics"] == [("metrics", 3), ("metrics", 4)]
