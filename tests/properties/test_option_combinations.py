"""Do all options of `multi_positive_infonce` work together? Combinations that hold every valid pair
of values, against the formula in fp64; and every combination that is refused says what it cannot
combine."""

import inspect
import itertools
from functools import cache, partial
from random import Random

import pytest
import torch
from hypothesis import strategies as st
from support.combinations import Refused, all_pairs, pairs_of, pairwise, random_combination
from support.examples import examples
from support.infonce_formula import infonce_formula
from support.infonce_options import (
    F64,
    FEATURES,
    OPTIONS,
    REFUSED,
    RULES,
    WITH_GRADIENT,
    arguments,
)
from support.problems import AVAILABLE

import ito_kernels as ik
from ito_kernels.losses.options import Options


def cast(given: dict, dtype: torch.dtype) -> dict:
    """The arguments with features in `dtype`, all else in fp32 (fp64 for fp64)."""
    found, wide = {}, F64 if dtype == F64 else torch.float32
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = x.to(dtype if name in FEATURES else wide)
        found[name] = x
    if given["keys"] is given["queries"]:
        found["keys"] = found["queries"]
    return found


def value_and_gradients(loss, given: dict) -> dict[str, torch.Tensor]:
    """{argument: its gradient}, and under "loss" the loss."""
    given = dict(given)
    one_tower = given["keys"] is given["queries"]
    for name in WITH_GRADIENT:
        if given[name] is not None:
            given[name] = given[name].detach().clone().requires_grad_()
    leaves = {name: given[name] for name in WITH_GRADIENT if given[name] is not None}
    if one_tower:
        given["keys"] = given["queries"]
        del leaves["keys"]
    value = loss(**given)
    if isinstance(value, tuple):  # the losses of all anchors
        value = torch.cat(value)
    total = (value * torch.linspace(1, 2, value.numel())).sum() if value.ndim else value
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return {"loss": value.detach()} | dict(zip(leaves, gradients, strict=True))


def formula(queries, keys, logit_scale, query_ids, key_ids, **options):
    zero = 0 * queries.nan_to_num().sum()  # a graph, if no anchor has a positive
    found = infonce_formula(queries, keys, logit_scale, query_ids, key_ids, **options)
    return tuple(x + zero for x in found) if isinstance(found, tuple) else found + zero


def library(backend: str, **given):
    found = ik.multi_positive_infonce(**given, backend=backend)
    return found[0] if given["return_stats"] else found


@cache
def combinations() -> tuple:
    return pairwise(OPTIONS, RULES)


def named(chosen: dict) -> str:
    """The options of a combination that have not their defaults, for messages."""
    return str({name: v for name, v in chosen.items() if v != OPTIONS[name][0]})


def check_in_fp64(chosen: dict, backend: str, seed: int = 0) -> None:
    given = arguments(chosen, seed)
    ours = value_and_gradients(partial(library, backend), given)
    for name, truth in value_and_gradients(formula, given).items():
        size = truth.abs().max().item()
        torch.testing.assert_close(
            ours[name],
            truth,
            rtol=1e-10,
            atol=1e-10 * size + 1e-12,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )
    if chosen["return_stats"]:
        check_stats(given, backend)


def check_stats(given: dict, backend: str) -> None:
    """`return_stats` against what the formula notes for each anchor."""
    options, notes = dict(given), {}
    features = [options.pop(name) for name in ("queries", "keys", "logit_scale")]
    ids = [options.pop(name) for name in ("query_ids", "key_ids")]
    infonce_formula(*features, *ids, stats=notes, **options)
    stats = ik.multi_positive_infonce(**given, backend=backend)[1]
    for side in ("row", "col") if given["symmetric"] else ("row",):
        for name in (f"{side}_loss", f"{side}_lse"):
            at = torch.tensor([*notes[name]], dtype=torch.long)
            truth = torch.tensor([*notes[name].values()], dtype=F64)
            torch.testing.assert_close(stats[name][at], truth, rtol=1e-10, atol=1e-10)
    if given["positive_pairs"] is not None:
        return
    means = {"positive_score": "row_positive", "hardest_negative_score": "row_negative"}
    means |= {"row_accuracy": "row_accuracy"}
    means |= {"col_accuracy": "col_accuracy"} if given["symmetric"] else {}
    for name, noted in means.items():
        values = [float(x) for x in notes[noted].values()]
        truth = torch.tensor(sum(values) / max(len(values), 1), dtype=F64)
        torch.testing.assert_close(stats[name], truth, rtol=1e-10, atol=1e-10, msg=name)


def test_the_table_has_every_option_and_its_default():
    """A new option must be added here, and to the formula."""
    signature = inspect.signature(ik.multi_positive_infonce).parameters
    optional = {k: p.default for k, p in signature.items() if p.default is not p.empty}
    del optional["group"], optional["backend"]
    of_the_signature = OPTIONS.keys() - {"keys", "logit_scale"}
    assert optional == {name: OPTIONS[name][0] for name in of_the_signature}
    assert {*Options._fields} <= optional.keys()


def test_every_pair_of_values_is_in_a_combination_or_raises():
    """41 combinations hold all pairs but those of which one value alone excludes the other."""
    found, impossible = combinations()
    assert {*all_pairs(OPTIONS)} == set(impossible).union(*map(pairs_of, found))
    defaults = {name: values[0] for name, values in OPTIONS.items()}
    for pair in impossible:
        with pytest.raises(ValueError, match="|".join(dict(pair))):
            library("reference", **arguments(defaults | dict(pair)))


@pytest.mark.parametrize(("refused", "named"), REFUSED, ids=[str(x) for x in RULES])
def test_what_is_refused_raises_whatever_else_is_given(refused, named):
    rules = Refused(OPTIONS, [entry for entry in RULES if entry is not refused])
    values = [v if isinstance(v, tuple) else (v,) for v in refused.values()]
    for i, chosen in enumerate(itertools.product(*values)):
        start = dict(zip(refused, chosen, strict=True))
        combination = rules.completed(start, lambda *_: 0, Random(i))
        assert combination is not None, "the other entries refuse this too"
        with pytest.raises(ValueError, match=named):
            library("reference", **arguments(combination))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_pairs_of_options(backend):
    for chosen in combinations()[0]:
        try:
            check_in_fp64(chosen, backend)
        except Exception as error:
            raise AssertionError(named(chosen)) from error


@pytest.mark.parametrize("backend", [x for x in AVAILABLE if x != "triton"])
def test_pairs_of_options_in_fp32_and_half_precision(backend):
    """The accuracy rule, where the formula in fp32 is dense PyTorch. Half precision is close to
    fp64, because only the features and their gradients are rounded."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, chosen in enumerate(combinations()[0]):
        dtype = dtypes[i % 3]
        if dtype != torch.float32:  # normalised features are rounded again, perhaps over a margin
            chosen = chosen | {"normalize": False}
        given = cast(arguments(chosen), dtype)
        ours = value_and_gradients(partial(library, backend), given)
        truth = value_and_gradients(formula, cast(given, F64))
        peer = value_and_gradients(formula, cast(given, torch.float32))
        for name, x in truth.items():
            factor, eps = (2, 1e-5) if name == "loss" else (3, 1e-5 * x.abs().max().item())
            eps = eps if dtype == torch.float32 else 1e-2 * (1 + x.abs().max().item())
            error, of_peer = ((y[name].double() - x).abs().max() for y in (ours, peer))
            assert error <= factor * of_peer + eps + 1e-7, (named(chosen), name)


@examples(1, 3000, random=st.randoms(use_true_random=False))
def test_random_combinations(random):
    chosen = random_combination(OPTIONS, RULES, random)
    check_in_fp64(chosen, random.choice(["reference", "chunked"]), random.randrange(1000))
