"""What every criterion shares: the caller's model untouched, determinism, errors; and the definitions of the simple ones."""

from __future__ import annotations

import copy
import functools
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grasp_sparse.criteria import CRITERIA, class_balanced, get_criterion, score
from grasp_sparse.pruning import make_masks, prune
from small_models import data, norm_net, smooth_net


def snapshot(model: nn.Module) -> list:
    return [
        copy.deepcopy(model.state_dict()),
        {name: (p.requires_grad, None if p.grad is None else p.grad.clone(), id(p)) for name, p in model.named_parameters()},
        [(module.training, dict(module._forward_hooks), dict(module._backward_hooks)) for module in model.modules()],
    ]


def assert_untouched(model: nn.Module, before: list) -> None:
    state, parameters, modules = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    for name, (requires_grad, grad, identity) in parameters.items():
        old_requires_grad, old_grad, old_identity = before[1][name]
        assert (requires_grad, identity) == (old_requires_grad, old_identity)
        assert (grad is None) == (old_grad is None) and (grad is None or torch.equal(grad, old_grad))
    assert modules == before[2]


def busy_model() -> nn.Module:
    """A model in the middle of something: gradients, mixed modes, a frozen layer, a hook."""
    model = norm_net()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda module, inputs, output: output * 1.0)
    return model


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_callers_model_and_random_state_come_back_bit_identical(criterion):
    model = busy_model()
    before = snapshot(model)
    loader = DataLoader(TensorDataset(*data(40)), batch_size=10, shuffle=True)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    scores = score(model, loader, criterion, seed=5)
    assert_untouched(model, before)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1]) and states[2] == random.getstate()
    shapes = {name: p.shape for name, p in model.named_parameters() if p.ndim > 1}
    assert {name: value.shape for name, value in scores.items()} == shapes
    assert not any(value.requires_grad for value in scores.values())


def test_an_exception_leaves_no_trace_either():
    model = busy_model()
    before, rng = snapshot(model), torch.get_rng_state()

    def failing():
        torch.rand(3)
        yield data()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, failing())
    assert_untouched(model, before)
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_random_state_gives_the_same_bits(criterion):
    model, loader = norm_net(), DataLoader(TensorDataset(*data(40)), batch_size=10, shuffle=True)
    first, second = score(model, loader, criterion), score(model, loader, criterion)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.rand(1)
    seeded = [score(model, loader, criterion, seed=1), score(model, loader, criterion, seed=1)]
    assert all(torch.equal(seeded[0][name], seeded[1][name]) for name in first)
    if criterion in ("grasp", "snip", "random"):
        other = score(model, loader, criterion, seed=2)
        assert any(not torch.equal(seeded[0][name], other[name]) for name in first)


def test_snip_is_weight_times_gradient():
    model, (x, y) = smooth_net().double(), data()
    F.cross_entropy(model(x.double()), y).backward()
    for name, value in score(model, [(x, y)], "snip").items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(value, (weight * weight.grad).abs().detach())


def test_magnitude_needs_no_data():
    model = smooth_net()
    for name, value in score(model, criterion="magnitude").items():
        assert torch.equal(value, model.get_parameter(name).abs())


def test_random_is_independent_of_the_dtype_of_the_model_and_without_ties():
    scores = torch.cat([value.flatten() for value in score(nn.Linear(200, 200), criterion="random", seed=0).values()])
    assert len(scores.unique()) == len(scores)
    assert torch.equal(scores.view(200, 200), score(nn.Linear(200, 200).half(), criterion="random", seed=0)["weight"])


def test_random_keeps_groups_of_any_size_alike():
    """Blocks at edges are an eighth as large as others, and a layer of small channels stands beside one of large ones."""
    edges = make_masks(score(nn.Linear(32 * 400, 36), criterion="random", seed=1), 0.9, "block(32, 32)")["weight"]
    whole, thin = int(edges[0, ::32].sum()), int(edges[-1, ::32].sum())
    assert 16 <= whole <= 64 and 16 <= thin <= 64 + 7  # of 400 each; what is left of a budget goes to small ones
    model = nn.Sequential(nn.Linear(8, 400), nn.Linear(512, 400))
    masks = make_masks(score(model, criterion="random", seed=1), 0.75, "channel")
    thin, wide = (int(mask[:, 0].sum()) for mask in masks.values())
    assert wide == pytest.approx(100, abs=35) and 65 <= thin <= 135 + 64


def test_synflow_scores_the_paths_of_magnitudes_and_conserves_flow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    scores = score(model, [(torch.randn(4, 3), torch.zeros(4))], "synflow")
    a, b = (model[i].weight.detach().double().abs() for i in (0, 2))
    torch.testing.assert_close(scores["0.weight"], a * b.sum(0)[:, None])
    torch.testing.assert_close(scores["2.weight"], b * a.sum(1)[None, :])
    assert scores["0.weight"].sum().item() == pytest.approx(scores["2.weight"].sum().item())


class Buffered(nn.Module):
    """Two layers with a buffer between them, `combine`d with what the first gives."""

    def __init__(self, buffer: torch.Tensor, combine, persistent: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.combine = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False), combine
        self.register_buffer("between", buffer, persistent=persistent)

    def forward(self, x):
        return self.last(torch.relu(self.combine(self.first(x), self.between)))


SIGNED = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0])


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "buffer",
    [SIGNED, SIGNED[:1].neg().expand(6), SIGNED + 0j, SIGNED * 1j],
    ids=["signed", "expanded", "complex", "imaginary"],
)
def test_synflow_takes_the_magnitude_of_every_buffer(buffer, persistent):
    model = Buffered(buffer.clone() if buffer.is_contiguous() else buffer, lambda x, between: (x * between).real, persistent)
    before = model.between.clone()
    scores = score(model, [(torch.randn(3, 4), None)], "synflow")
    a, b, scale = model.first.weight.detach().double().abs(), model.last.weight.detach().double().abs(), buffer.abs().double()
    torch.testing.assert_close(scores["first.weight"], a * (scale * b.sum(0))[:, None])
    torch.testing.assert_close(scores["last.weight"], b * (scale * a.sum(1))[None, :])
    assert torch.equal(model.between, before)


@pytest.mark.parametrize("persistent", [False, True])
def test_synflow_leaves_a_mask_of_infinities_one(persistent):
    model = Buffered(torch.tensor([0.0, 0.0, 0.0, *[-torch.inf] * 3]), lambda x, mask: (x + mask).softmax(-1), persistent)
    scores = score(model, [(torch.randn(3, 4), None)], "synflow")
    assert torch.equal(scores["last.weight"] > 0, torch.arange(6).expand(2, 6) < 3)
    assert all(torch.isfinite(value).all() for value in scores.values())


def test_synflow_does_not_read_more_than_one_batch():
    def endless():
        yield data()
        raise AssertionError("read a second batch")

    score(smooth_net(), endless(), "synflow")


def test_synflow_overflow_in_float32_names_the_layer_and_the_cure():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e5)
    batches = [(torch.randn(2, 64), torch.zeros(2))]
    assert torch.isfinite(score(model, batches, "synflow")["0.weight"]).all()
    with pytest.raises(ValueError, match=r"'0\.weight'.*float64"):
        score(model, batches, "synflow", dtype=torch.float32)


def test_nan_names_the_layer():
    model = smooth_net()
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN in '5\.weight'"):
        score(model, criterion="magnitude")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_without_values_are_refused(criterion):
    with pytest.raises(ValueError, match=r"Expected weights with values, got '0\.weight' on the meta device: call model\.to_empty"):
        score(smooth_net().to("meta"), [data()], criterion)


def test_a_criterion_of_ones_own():
    def by_row(model, weights, batches, loss_fn, *, sign=1):
        return {name: sign * weight.detach().sum(1, keepdim=True).expand_as(weight) for name, weight in weights.items()}

    model = nn.Linear(3, 2)
    assert torch.equal(score(model, None, by_row, sign=-1)["weight"][:, 0], -model.weight.detach().sum(1))
    with pytest.raises(ValueError, match="score every weight"):
        score(model, None, lambda model, weights, batches, loss_fn: {})


def test_include_exclude_and_tied_weights():
    model = smooth_net()
    assert list(score(model, [data()], include="5")) == ["5.weight"]
    assert list(score(model, [data()], exclude=lambda name, module: module is model[0])) == ["2.weight", "5.weight"]
    tied = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.Tanh(), nn.Linear(72, 72))
    tied[3].weight = tied[1].weight
    scores = score(tied, [data()])
    assert list(scores) == ["1.weight"]


def _around(model: nn.Module, how: str) -> None:
    """Sets a forward on the model that computes what its own does."""
    inner, kind = model.forward, type(model)
    forwards = {
        "closure": lambda x: kind.forward(model, x),
        "default": lambda x, network=model: kind.forward(network, x),
        "global": eval("lambda x: type(network).forward(network, x)", {"network": model}),
        "inner forward": lambda x: inner(x),
        "method": types.MethodType(lambda self, x: inner(x), model),
        "partial": functools.partial(lambda forward, x: inner(x), inner),
        "bound": types.MethodType(kind.forward, model),
        "copied partial": functools.partial(kind.forward, model),
        "partial of bound": functools.partial(inner),
        "its own module": types.MethodType(lambda self, x: kind.forward(self, x), model),
    }
    model.forward = forwards[how]


@pytest.mark.parametrize("how", ["closure", "default", "global", "inner forward", "method", "partial"])
def test_a_forward_that_would_run_the_callers_model_is_refused(how):
    model = norm_net()
    _around(model, how)
    before = snapshot(model)
    for use in (score, prune):
        with pytest.raises(ValueError, match="got a forward set on the model itself that is a function around the model itself"):
            use(model, [data()], criterion="snip")
    assert_untouched(model, before)
    assert score(model, None, "magnitude")  # which runs nothing


@pytest.mark.parametrize("how", ["bound", "copied partial", "partial of bound", "its own module"])
def test_a_forward_that_is_copied_with_its_module_is_one(how):
    model = norm_net()
    expected = score(model, [data()], "snip")
    _around(model, how)
    model[2].forward = lambda x, plain=model[2].forward: plain(x)  # a module without weights or buffers: nothing of it changes
    before = snapshot(model)
    got = score(model, [data()], "snip")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert_untouched(model, before)


def test_inputs_may_be_tuples_and_dicts():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = smooth_net()

        def forward(self, x, scale):
            return self.body(x * scale[:, None, None, None])

    model, (x, y) = Two(), data()
    expected = score(model.body, [(x, y)], micro_batch_size=5)
    for inputs in ((x, torch.ones(20)), {"x": x, "scale": torch.ones(20)}):
        got = score(model, [(inputs, y)], micro_batch_size=5)
        assert all(torch.equal(got["body." + name], value) for name, value in expected.items())


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_class_balanced_sampling_scores_the_drawn_samples(criterion):
    model, loader = smooth_net(), DataLoader(TensorDataset(*data(60)), batch_size=7)
    drawn = class_balanced(loader, 2, 5, num_batches=3)
    expected = score(model, drawn, criterion)
    got = score(model, loader, criterion, samples_per_class=2, num_classes=5, num_batches=3)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_samples_may_have_been_made_in_inference_mode(criterion):
    expected = score(smooth_net(), [data()], criterion)
    with torch.inference_mode():
        got = score(smooth_net(), [data()], criterion)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_works_inside_no_grad_and_inference_mode():
    model, batches = smooth_net(), [data()]
    expected = score(model, batches)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(score(model, batches)["5.weight"], expected["5.weight"])


def _flat():
    return [(data()[0].flatten(1), data()[1])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score(smooth_net(), [data()], "grasps"), "grasp, snip, synflow, magnitude, random"),
        (lambda: score(smooth_net(), None), "batches"),
        (lambda: score(smooth_net(), []), "at least one batch"),
        (lambda: score(smooth_net(), [data()[0]]), r"\(input, target\)"),
        (lambda: score(smooth_net(), [(*data(), 1)]), r"\(input, target\)"),
        (lambda: score(smooth_net(), [data(0)]), "at least one sample"),
        (lambda: score(smooth_net(), [data()], num_batches=2), "num_batches=2"),
        (lambda: score(smooth_net(), [data()], num_batches=0), "num_batches"),
        (lambda: score(smooth_net(), [data()], samples_per_class=2), "together"),
        (lambda: score(nn.Sequential(nn.Conv1d(1, 1, 1)), None, "magnitude"), "two-dimensional"),
        (lambda: get_criterion("none"), "none"),
        (lambda: score(nn.Linear(72, 1), _flat(), loss_fn=lambda out, y: out.mean()), "0 for every weight.*without curvature"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_two_equal_parts_in_two_processes_score_as_the_one_part(criterion):
    """Two processes with the same batches: every sum doubles, and so does the number of samples."""
    calls = []

    def both(tensors):
        calls.append(len(tensors))
        for tensor in tensors:
            tensor.mul_(2)

    model, batches = smooth_net().double(), [data()]
    alone = score(model, batches, criterion)
    together = score(model, batches, criterion, reduce=both)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name])
    assert len(calls) == (2 if criterion == "grasp" else 1)


def test_a_process_without_batches_takes_part_but_not_all_can_be_without():
    model = smooth_net()
    with pytest.raises(ValueError, match="Expected at least one batch, got none in any of the processes"):
        score(model, [], "snip", reduce=lambda tensors: None)
    with pytest.raises(ValueError, match="Expected one of the named criteria with reduce"):
        score(model, [data()], lambda *arguments: {}, reduce=lambda tensors: None)


@pytest.mark.parametrize("criterion", ["synflow", "magnitude", "random"])
def test_what_adds_nothing_over_samples_is_not_shared(criterion):
    def never(tensors):
        raise AssertionError("nothing to reduce")

    score(smooth_net(), [data()], criterion, seed=0, reduce=never)
