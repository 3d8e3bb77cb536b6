"""The laws of GraSP: score = θ ⊙ Hg, larger is kept (S of the paper is its negative)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grasp_sparse import pruning
from grasp_sparse.criteria import score
from grasp_sparse.pruning import make_masks, prune
from small_models import data, norm_net, smooth_net

F64 = torch.float64


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor, temperature: float, names) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    loss = F.cross_entropy(model(x) / temperature, y)
    return dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_equals_finite_differences_of_the_gradient(temperature):
    model, (x, y) = smooth_net().double(), data()
    x = x.double()
    scores = score(model, [(x, y)], temperature=temperature)
    g = gradient(model, x, y, temperature, scores)
    norm = torch.sqrt(sum(value.square().sum() for value in g.values()))
    shifted = []
    for step in (1e-4, -1e-4):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in g:
                    parameter += step * g[name] / norm
        shifted.append(gradient(moved, x, y, temperature, scores))
    for name, parameter in model.named_parameters():
        if name in scores:
            expected = parameter * (shifted[0][name] - shifted[1][name]) / 2e-4 * norm
            assert (scores[name] - expected).norm() <= 1e-6 * expected.norm()


def test_layers_that_feed_only_batchnorm_sum_to_minus_their_squared_gradient():
    model, (x, y) = norm_net(eps=1e-12).double(), data()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    scores = score(model, [(x, y)])
    g = gradient(model.train(), x.double(), y, 200.0, scores)
    for name in ("0.weight", "3.weight"):
        assert scores[name].sum().item() == pytest.approx(-g[name].square().sum().item(), rel=1e-4, abs=0)


def test_final_linear_sums_to_the_squared_gradient_of_the_others_at_high_temperature():
    model, (x, y) = smooth_net().double(), data()
    scores = score(model, [(x, y)], temperature=1e6)
    g = gradient(model, x.double(), y, 1e6, scores)
    others = sum(value.square().sum().item() for name, value in g.items() if name != "5.weight")
    assert scores["5.weight"].sum().item() == pytest.approx(others, rel=1e-4, abs=0)


def test_kept_set_hardly_depends_on_a_high_temperature():
    model, batches = norm_net().eval(), [data(40)]
    kept = {t: make_masks(score(model, batches, temperature=t, dtype=F64), 0.9) for t in (100, 200, 1000)}
    for t in (100, 1000):
        both = sum(int((kept[200][name] & kept[t][name]).sum()) for name in kept[t])
        either = sum(int((kept[200][name] | kept[t][name]).sum()) for name in kept[t])
        assert both / either >= 0.98


@pytest.mark.parametrize("cut", [[20], [10, 10], [1] * 20, [13, 4, 3]])
@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_the_cut_into_micro_batches_does_not_matter_without_batchnorm(criterion, cut):
    model, (x, y) = smooth_net().double(), data()
    whole = score(model, [(x, y)], criterion)
    pieces = score(model, zip(x.split(cut), y.split(cut), strict=True), criterion)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_micro_batch_size_does_not_matter_without_batchnorm(criterion):
    model, batches = smooth_net().double(), [data(20), data(7, seed=2)]
    whole = score(model, batches, criterion)
    pieces = score(model, batches, criterion, micro_batch_size=3)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-9, atol=0)


def test_train_mode_uses_batch_statistics_and_eval_mode_the_running_ones():
    model, batches = norm_net(), [data()]
    train, running = (score(model, batches, train=flag, seed=0) for flag in (True, False))
    assert any(not torch.allclose(train[name], running[name], rtol=0.1) for name in train)
    model.eval()
    assert all(torch.equal(train[name], value) for name, value in score(model, batches, seed=0).items())


def test_float64_agrees_with_float32_and_is_returned_as_float64():
    model, batches = smooth_net(), [data()]
    single, double = score(model, batches), score(model, batches, dtype=F64)
    for name in single:
        assert single[name].dtype == torch.float32 and double[name].dtype == F64
        assert (single[name] - double[name]).norm() < 1e-4 * double[name].norm()


def test_half_precision_models_are_scored_in_float32():
    scores = score(smooth_net().bfloat16(), [data()])
    assert all(value.dtype == torch.float32 for value in scores.values())


def test_both_passes_see_the_same_dropout_masks():
    """With the dropped units fixed, H is one matrix: Σ θ·Hg over the last layer at high temperature obeys its law."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 30, bias=False), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, 5)).double()
    x, y = data()
    scores = score(model, [(x, y)], temperature=1e6, seed=3)
    torch.manual_seed(3)
    g = gradient(model.train(), x.double(), y, 1e6, scores)
    assert scores["4.weight"].sum().item() == pytest.approx(g["1.weight"].square().sum().item(), rel=1e-4, abs=0)


def test_a_random_loader_is_sampled_once():
    """Augmentation drawn anew for the second pass would change the score: a stored copy of what was drawn gives the same."""
    model = smooth_net().double()
    drawn = []

    def loader():
        for _ in range(3):
            drawn.append((torch.randn(4, 2, 6, 6), torch.randint(5, (4,))))
            yield drawn[-1]

    live = score(model, loader())
    assert len(drawn) == 3
    replayed = score(model, drawn)
    assert all(torch.equal(live[name], replayed[name]) for name in live)


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    scores = score(model, [(torch.randn(4, 3, 8), torch.tensor([0, 1, 2, 0]))])
    assert list(scores) == ["0.linear1.weight", "0.linear2.weight", "2.weight"]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"preset": "papers"}, {"redraw": "some"}, {"loss_fn": lambda out, y: out}, {"loss_fn": max}]
)
def test_bad_options_are_refused(options):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        score(smooth_net(), [data()], **options)


def test_an_output_that_is_no_tensor_is_explained():
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = smooth_net()

        def forward(self, x):
            return {"logits": self.body(x)}

    model = Dictionary()
    with pytest.raises(ValueError, match="temperature=1"):
        score(model, [data()])
    named = score(model, [data()], loss_fn=lambda out, y: F.cross_entropy(out["logits"], y), temperature=1)
    plain = score(model.body, [data()], temperature=1)
    assert all(torch.equal(named["body." + name], value) for name, value in plain.items())


def literal_paper_masks(model, batches, sparsity, generator, temperature=200.0):
    """The authors' procedure, restated: copy, re-draw Linears, halves, sum of gradients, threshold on S = −θ·Hg."""
    net = copy.deepcopy(model).train()
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for m in layers:
        if isinstance(m, nn.Linear):
            nn.init.xavier_normal_(m.weight, generator=generator)
    weights = [m.weight for m in layers]
    halves = [h for x, y in batches for n in [len(x) // 2] for h in ((x[:n], y[:n]), (x[n:], y[n:]))]
    g = [torch.zeros_like(w) for w in weights]
    for x, y in halves:
        for total, part in zip(g, torch.autograd.grad(F.cross_entropy(net(x) / temperature, y), weights), strict=True):
            total.data += part
    for x, y in halves:
        first = torch.autograd.grad(F.cross_entropy(net(x) / temperature, y), weights, create_graph=True)
        sum((a * b.detach()).sum() for a, b in zip(first, g, strict=True)).backward(inputs=weights)
    removal = torch.cat([(-w * w.grad).flatten() for w in weights])
    keep = 1 - sparsity
    threshold = removal.topk(int(len(removal) * (1 - keep))).values[-1]
    return [-w * w.grad <= threshold for w in weights]


@pytest.mark.filterwarnings("ignore:Layers kept below")
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("draws", [1, 2])
def test_paper_preset_matches_the_authors_procedure_weight_for_weight(sparsity, draws):
    model = norm_net().double()
    model[8].p = 0.0
    batches = [(data(21, seed)[0].double(), data(21, seed)[1]) for seed in range(draws)]
    masks = prune(model, batches, sparsity, preset="paper", generator=torch.Generator().manual_seed(7))
    expected = literal_paper_masks(model, batches, sparsity, torch.Generator().manual_seed(7))
    assert all(torch.equal(mask, other) for mask, other in zip(masks.values(), expected, strict=True))
    assert masks.kept == masks.numel - int(masks.numel * (1 - (1 - sparsity))) + 1
    assert masks.recipe["rule"] == "paper"


def test_redraw_takes_every_linear_or_only_the_last_and_leaves_the_model_alone():
    model, batches = norm_net(), [data()]
    before = copy.deepcopy(model.state_dict())

    def scored(**options):
        return score(model, batches, train=False, generator=torch.Generator().manual_seed(1), **options)

    none, last, every = scored(), scored(redraw="last"), scored(redraw="all")
    assert not torch.equal(none["9.weight"], last["9.weight"])
    assert not torch.equal(last["7.weight"], every["7.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = scored(redraw="all")
    assert all(torch.equal(every[name], again[name]) for name in every)


@pytest.mark.parametrize(("redraw", "redrawn"), [("last", [9]), ("all", [7, 9])])
def test_redraw_is_scoring_a_model_with_these_linears_redrawn(redraw, redrawn):
    model, batches, generator = norm_net(), [data()], torch.Generator().manual_seed(1)
    other = copy.deepcopy(model)
    for index in redrawn:
        nn.init.xavier_normal_(other[index].weight, generator=generator)
    scores = score(model, batches, seed=0, redraw=redraw, generator=torch.Generator().manual_seed(1))
    expected = score(other, batches, seed=0)
    assert all(torch.equal(scores[name], expected[name]) for name in scores)


def test_paper_preset_refuses_a_batch_that_has_no_halves():
    with pytest.raises(ValueError, match="two samples"):
        score(smooth_net(), [data(1)], preset="paper")


@pytest.mark.parametrize("preset", [None, "paper"])
def test_what_is_gone_has_no_part_in_the_gradient(preset):
    """In rounds: the scores of what is left are those of the network without the inputs that no weight is left for."""
    torch.manual_seed(0)
    whole, small = (nn.Sequential(nn.Linear(n, 8), nn.Tanh(), nn.Linear(8, 3)).double() for n in (6, 4))
    x, y = torch.randn(12, 6, dtype=F64), torch.arange(12) % 3
    with torch.no_grad():
        small[0].weight.copy_(whole[0].weight[:, :4])
        small[0].bias.copy_(whole[0].bias)
        small[2].load_state_dict(whole[2].state_dict())
    within = {"0.weight": torch.ones(8, 6, dtype=torch.bool), "2.weight": torch.ones(3, 8, dtype=torch.bool)}
    within["0.weight"][:, 4:] = False
    # Drawn again are weights of other sizes, so that the two could not be compared: "last" are of the same.
    options = {"preset": preset, "redraw": "last", "generator": torch.Generator()} if preset else {}
    with torch.no_grad():
        whole[0].weight[:, 5] = torch.nan  # gone is gone, whatever it was
    found = []
    for model, images, masks in ((whole, x, within), (small, x[:, :4].contiguous(), None)):
        if preset:
            options["generator"].manual_seed(1)
        found.append(score(model, [(images, y)], dtype=F64, within=masks, **options))
    left, expected = found
    torch.testing.assert_close(left["0.weight"][:, :4], expected["0.weight"])
    torch.testing.assert_close(left["2.weight"], expected["2.weight"])
    assert not left["0.weight"][:, 4:].any()


def test_weights_that_are_gone_are_not_drawn_again():
    """What they read changes nothing."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(12, 6), torch.arange(12) % 3
    other = x.clone()
    other[:, 4:] = torch.randn(12, 2)
    within = {"0.weight": torch.ones(8, 6, dtype=torch.bool), "2.weight": torch.ones(3, 8, dtype=torch.bool)}
    within["0.weight"][:, 4:] = False
    one, two = (score(model, [(images, y)], redraw="all", seed=3, within=within) for images in (x, other))
    torch.testing.assert_close(one, two)
    assert one["0.weight"].any()


def test_rounds_score_the_network_that_is_left(monkeypatch):
    """The masks of a round are what the next one is scored within; the model itself is what every round starts from."""
    torch.manual_seed(0)
    model, x, y, seen = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(12, 6), torch.arange(12) % 3, []

    def watched(network, *args, within=None, **options):
        assert network is model
        seen.append(within)
        return score(network, *args, within=within, **options)

    monkeypatch.setattr(pruning, "score", watched)
    masks = prune(model, [(x, y)], 0.8, iterations=3)
    assert seen[0] is None and len(seen) == 3
    kept = [sum(int(mask.sum()) for mask in within.values()) for within in (*seen[1:], masks)]
    assert kept[0] > kept[1] > kept[2] == round(0.2 * 72)
    for before, after in ((seen[1], seen[2]), (seen[2], masks)):
        assert all(bool((after[name] <= before[name]).all()) for name in after)


def test_autocast_outside_does_not_round_scores():
    model, batch = smooth_net(), data()
    expected = score(model, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        got = score(model, [batch])
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_masks_to_score_within_are_checked():
    model, batch = smooth_net(), data()
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in score(model, [batch], "magnitude").items()}
    masks.pop(next(iter(masks)))
    with pytest.raises(ValueError, match="Expected within to hold a bool mask"):
        score(model, [batch], within=masks)
    with pytest.raises(ValueError, match="Expected within to hold a bool mask"):
        score(model, [batch], within=[torch.ones(3, dtype=torch.bool)])
    with pytest.raises(ValueError, match="Expected no within"):
        prune(model, iter([batch]), within=masks)
    scores = {"w": torch.arange(4.0)}
    with pytest.raises(ValueError, match="Expected no within with rule='paper'"):
        make_masks(scores, 0.5, rule="paper", within={"w": torch.ones(4, dtype=torch.bool)})
