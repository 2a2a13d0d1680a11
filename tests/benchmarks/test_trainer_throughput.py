"""The profile of a training step: is every moment counted once, for the part that ran in it?"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import trainer_throughput
from trainer_throughput import REST, Clock

now = 0  # the seconds of the test's clock


class Slow(torch.autograd.Function):
    """Doubles; forward takes 10 s, backward 30."""

    @staticmethod
    def forward(ctx, x):
        global now
        now += 10
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        global now
        now += 30
        return 2 * grad


def test_a_part_has_its_forward_and_backward_pass_without_those_inside_it(monkeypatch):
    monkeypatch.setattr(trainer_throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock()
    inner = clock.timed("inner", Slow.apply, lambda out: out)
    outer = clock.timed("outer", lambda x: Slow.apply(Slow.apply(inner(x))), lambda out: out)
    backward = clock.timed(REST, lambda y: y.backward())
    backward(outer(torch.ones((), requires_grad=True)))
    clock.start(REST)
    want = {"outer": 20, "inner": 10, "outer, backward": 60, "inner, backward": 30}
    assert {part: seconds for part, seconds in clock.spent.items() if seconds} == want
