"""How the losses are built: what a small call passes through and leaves behind, what compiles."""

import gc
import sys

import pytest
import torch
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.losses.scores import Scores
from ito_kernels.similarity.primitive import logsumexp_of

N = 12
IDS = torch.arange(N) // 3
PAIRS = torch.stack([torch.arange(N), (torch.arange(N) * 5) % N], 1)


def features(count: int = 3) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(N, 6, generator=rng)).requires_grad_() for _ in range(count)]


def frames_above(function, call) -> list[str]:
    """The names of the frames between `call` and `function`, outermost first."""
    found = []

    def hook(frame, event, _):
        if event == "call" and frame.f_code is function.__code__:
            above = frame.f_back
            while above.f_code is not call.__code__:
                found.append(above.f_code.co_name)
                above = above.f_back

    sys.setprofile(hook)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[::-1]


def test_a_plain_loss_reaches_the_primitive_at_once():
    """A small call's time is Python's: every frame counts. In clip_loss there were three."""
    x, y, _ = features()
    ways = {
        "clip_loss": lambda: ik.clip_loss(x, y, 5.0),
        "supcon_loss": lambda: ik.supcon_loss(x, IDS),
        "multi_positive_infonce": lambda: ik.multi_positive_infonce(
            x, y, 5.0, query_ids=IDS, key_ids=IDS, empty="drop", return_stats=True
        ),
    }
    for name, call in ways.items():
        # before them the check that ranks call alike
        assert frames_above(logsumexp_of, call) == ["call", name, "infonce"]


@pytest.mark.skipif(not ik.backends()["cpu"].available, reason="installed without a C++ compiler")
def test_a_small_call_is_the_kernel_and_little_else():
    """At N = 8 the kernel takes 12 of a call's 60 µs. Every tensor operation beside it adds 1 to 8
    µs, every Python call about 0.5: 109 and 114 of them were 20 µs more."""
    x, y, _ = features()
    scale = torch.tensor(5.0, requires_grad=True)
    calls = []

    def hook(frame, event, _):
        if event == "call":
            calls.append(frame.f_code.co_name)

    for trains in (True, False):
        calls.clear()
        with torch.set_grad_enabled(trains):
            sys.setprofile(hook)
            try:
                ik.clip_loss(x, y, scale)
            finally:
                sys.setprofile(None)
            with torch.autograd.profiler.profile() as profile:
                ik.clip_loss(x, y, scale)
        assert len(calls) <= 100, calls
        # memory for the loss and for three gradients: no tensor is computed
        names = [e.name for e in profile.function_events if e.name.startswith("aten::")]
        memory = [name for name in names if name in ("aten::empty", "aten::empty_strided")]
        assert {*names} - {*memory} <= {"aten::new_empty", "aten::empty_like"}
        assert len(memory) == (4 if trains else 1)


@pytest.mark.skipif(not ik.backends()["cpu"].available, reason="installed without a C++ compiler")
def test_the_kernel_counts_and_sums():
    """siglip_loss divided ones and summed the weighted rows: 4 operations. supcon_loss sorted and
    searched to count positives, and looked for self pairs: 10 operations."""
    x, y, _ = features()
    not_needed = {
        "siglip": (lambda: ik.siglip_loss(x, y, 5.0, -2.0), {"new_ones", "div", "mul", "sum"}),
        "supcon": (lambda: ik.supcon_loss(x, IDS), {"sort", "searchsorted", "eq", "bitwise_and"}),
    }
    for name, (call, operations) in not_needed.items():
        with torch.autograd.profiler.profile() as profile:
            call()
        found = {e.name.removeprefix("aten::") for e in profile.function_events}
        assert not operations & found, name


BY_ID = {"query_ids": IDS, "key_ids": IDS}
OPTIONS = {
    "plain": {},
    "statistics": {"return_stats": True},
    "smoothing": BY_ID | {"label_smoothing": 0.1},
    "margin": BY_ID | {"false_negative_margin": 0.1, "label_smoothing": 0.1},
    "reweighted": BY_ID | {"debias": 0.1, "hardness": 0.5},
    "pairs": {"positive_pairs": PAIRS},
    "reweighted pairs": {"positive_pairs": PAIRS, "debias": 0.1, "hardness": 0.5},
}


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_die_with_the_call(name, per_query):
    """Nothing that autograd keeps may hold the scores or a pool: such a cycle keeps the memory of
    several steps until the garbage collector happens to run."""
    x, y, z = features()
    scale = torch.full((N,), 5.0) if per_query else 5.0
    options = OPTIONS[name] | {"queue": z.detach(), "hard_negatives": z[:, None]}
    if per_query and "debias" in options:
        options |= {"symmetric": False}
    ik.multi_positive_infonce(x, y, scale, **options)  # what is loaded once keeps its caller
    gc.collect()
    gc.disable()
    try:
        loss = ik.multi_positive_infonce(x, y, scale, **options)
        young = gc.get_objects(generation=0)  # what is new since nothing is collected
        assert not [thing for thing in young if type(thing) is Scores]
        del loss
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, z: ik.cacr_loss(x, y),
        lambda x, y, z: ik.soft_target_infonce(
            x, y, 5.0, target_queries=z.detach(), target_keys=z.detach(), target_scale=3.0
        ),
        lambda x, y, z: ik.multi_positive_infonce(x, y, 5.0, positive_pairs=PAIRS, debias=0.1),
        lambda x, y, z: ik.clip_loss(
            *(x, y, 5.0), guide_queries=z.detach(), guide_keys=z.detach(), false_negative_margin=0.0
        ),
    ],
    ids=["cacr", "soft targets", "reweighted pairs", "guide"],
)
def test_panels_compile_in_one_graph(loss):
    leaves = features()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, truth = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(found, truth)
    for x, y in zip(
        *(torch.autograd.grad(value, leaves[:2]) for value in (found, truth)), strict=True
    ):
        torch.testing.assert_close(x, y)


X, Y = torch.randn(5, 3), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("image_features and text_features .* unless query_ids", lambda: ik.clip_loss(X, Y, 1.0)),
        ("one id for each row of text_features", lambda: ik.clip_loss(X, X, 1.0, key_ids=IDS)),
        ("labels must have shape", lambda: ik.supcon_loss(X, IDS)),
        ("temperature must be finite", lambda: ik.supcon_loss(X, IDS[:5], -1.0)),
        ("z1 and z2 must have the same width", lambda: ik.nt_xent_loss(X, X[:, :2])),
        ("scale must be finite", lambda: ik.mnrl_loss(X, X, scale=0.0)),
        ("queries and negatives must have the same width", lambda: ik.mnrl_loss(X, X, X[:, :2])),
        ("x and y must be on the same device", lambda: ik.alignment_loss(X, X.to("meta"))),
        ("t must be finite", lambda: ik.uniformity_loss(X, t=-1.0)),
        ("modalities.0. and modalities.2. must have the same width", lambda: ik.symile_loss([X, X, X[:, :2]], 1.0)),  # noqa: E501
        ("one id for each row of text_features", lambda: ik.siglip_loss(X, X, 1.0, 0.0, text_ids=IDS)),  # noqa: E501
        ("image_views and text must be on", lambda: ik.ito_loss(X[None], X.to("meta"), None, 1.0, lambda_fusion=0)),  # noqa: E501
    ],
)  # fmt: skip
def test_errors_have_the_names_that_a_loss_gives_its_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="label_smothing"):
        ik.clip_loss(X, X, 1.0, label_smothing=0.1)
