"""Merging methods by their algebra, and those that learn against independent computations."""

import pytest
import torch
from torch.nn import functional as F

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.merging import registry
from probsurgery.pipeline.merging.adamerging import blend
from probsurgery.pipeline.merging.concrete import Mask
from probsurgery.pipeline.merging.entropy import add_gradients, entropy
from probsurgery.pipeline.merging.fisher import add_squares
from probsurgery.pipeline.merging.method import Method, Setting
from probsurgery.pipeline.merging.registry import METHODS, Coefficients, ImageStream, find_merge, merge
from probsurgery.pipeline.merging.regmean import InputGrams
from probsurgery.pipeline.merging.rescale import FACTORS
from probsurgery.pipeline.merging.sparse import magnitude_threshold, share_of, ties_vectors
from probsurgery.pipeline.merging.vectors import Merged
from probsurgery.pipeline.progress import no_progress

D_IN, HIDDEN, D, CLASSES = 6, 10, 5, 4
SHAPES = {"up.weight": (HIDDEN, D_IN), "up.bias": (HIDDEN,), "proj": (HIDDEN, D)}
MERGES = [f"wa+{name}" if row.follows else name for name, row in METHODS.items() if row.function is not None]
BRIEF = {"steps": 3, "images": 20, "batch_size": 8}
AT_FULL_WEIGHT = {
    "wa": {},
    "ta": {"scale": 1.0},
    "ties": {"scale": 1.0, "keep": 1.0},
    "dare": {"scale": 1.0, "drop": 0.0},
    "breadcrumbs": {"scale": 1.0, "small": 0.0, "large": 0.0},
    "fisher": {},
    "regmean": {},
    "regmean++": {},
    "tw-adamerging": {"initial": 1.0, "lr": 1e-9},
    "lw-adamerging": {"initial": 1.0, "lr": 1e-9},
    "tw-adamerging++": {"initial": 1.0, "keep": 1.0, "lr": 1e-9},
    "lw-adamerging++": {"initial": 1.0, "keep": 1.0, "lr": 1e-9},
    "adarank": {"initial": 1.0, "lr": 1e-9},
    "concrete-ta": {"scale": 1.0, "lr": 1e-9},
    "concrete-am": {"initial": 1.0, "lr": 1e-9},
    "consensus-ta": {"scale": 1.0},
    "tsv-m": {},
    "wudi": {},
    "wa+svc": {},
    "wa+rescale": {},
    "wa+featcal": {"ridge": 1e-8, "anchor": 1.0},
}


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


BASE = state(0)
EXPERTS = {f"task{i}": state(i) for i in range(1, 6)}


def forward(weights, images):
    """A small network whose images are vectors (B, D_IN)."""
    return F.relu(F.linear(images, weights["up.weight"], weights["up.bias"])) @ weights["proj"]


def images_of(task, count, dtype=torch.float32):
    g = torch.Generator().manual_seed(len(task) + sum(map(ord, task)))
    x = torch.randn(count, D_IN, generator=g) + torch.randn(D_IN, generator=g)
    return x.to(dtype), torch.randint(CLASSES, (count,), generator=g)


def batches(task, split, size, seed):
    images, labels = images_of(task, 64)
    g = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(64, (size,), generator=g)
        yield images[rows], labels[rows]


def make_stream(tasks=EXPERTS, run=forward, dtype=torch.float32, progress=no_progress):
    g = torch.Generator().manual_seed(99)
    weights = {task: 4 * F.normalize(torch.randn(CLASSES, D, generator=g), dim=-1).to(dtype) for task in EXPERTS}
    classifiers = {task: Classifier(weights[task]) for task in tasks}
    return ImageStream(run, classifiers, batches, torch.device("cpu"), progress)


def merged(method, base, experts, **settings):
    row = find_merge(method)
    brief = {k: v for k, v in BRIEF.items() if k in row.settings}
    stream = make_stream(experts) if row.learns else None
    return merge(method, base, experts, stream, **(brief | settings))


def close(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=atol) for n in a)


@pytest.mark.parametrize("method", [m for m in MERGES if not m.startswith("iso-")])  # which equalise even one spectrum
def test_one_task_at_full_weight_gives_the_expert_back(method):
    state_of_one = merged(method, BASE, {"task1": EXPERTS["task1"]}, **AT_FULL_WEIGHT[method]).state
    assert close(state_of_one, EXPERTS["task1"], atol=1e-4)


@pytest.mark.parametrize("method", MERGES)
def test_experts_equal_to_the_base_give_the_base(method):
    assert close(merged(method, BASE, dict.fromkeys(("task1", "task2", "task3"), BASE)).state, BASE, atol=1e-4)


@pytest.mark.parametrize("method", ["wa", "fisher", "regmean", "regmean++"])
def test_averages_of_identical_experts_are_the_expert(method):
    same = dict.fromkeys(("task1", "task2", "task3"), EXPERTS["task4"])
    assert close(merged(method, BASE, same).state, EXPERTS["task4"], atol=1e-4)


@pytest.mark.parametrize("method", [m for m in MERGES if "scale" in find_merge(m).settings])
def test_the_distance_to_the_base_grows_with_the_scale(method):
    settings = {"lr": 1e-9} if "lr" in find_merge(method).settings else {}
    once, twice = (merged(method, BASE, EXPERTS, scale=s, **settings).state for s in (0.3, 0.6))
    assert not close(once, BASE, atol=1e-2)
    assert close({n: 2 * (once[n] - BASE[n]) for n in BASE}, {n: twice[n] - BASE[n] for n in BASE})


@pytest.mark.parametrize("method", MERGES)
def test_every_expert_matters_and_their_order_does_not(method):
    whole = merged(method, BASE, EXPERTS).state
    assert close(whole, merged(method, BASE, dict(reversed(EXPERTS.items()))).state, atol=1e-4)
    for dropped in EXPERTS:
        assert not close(whole, merged(method, BASE, {t: e for t, e in EXPERTS.items() if t != dropped}).state)


@pytest.mark.parametrize("method", MERGES)
def test_the_same_seed_gives_the_same_bytes_and_nothing_is_changed_in_place(method):
    before = {n: t.clone() for n, t in (BASE | {f"e.{n}": t for n, t in EXPERTS["task1"].items()}).items()}
    a, b = (merged(method, BASE, EXPERTS).state for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in BASE)
    after = BASE | {f"e.{n}": t for n, t in EXPERTS["task1"].items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(t.requires_grad for t in a.values())


def test_weight_averaging_averages_all_tasks():
    mean = {n: torch.stack([e[n] for e in EXPERTS.values()]).mean(0) for n in BASE}
    assert close(merged("wa", BASE, EXPERTS).state, mean)
    without_last = {n: torch.stack([e[n] for e in list(EXPERTS.values())[:-1]]).mean(0) for n in BASE}
    assert not close(merged("wa", BASE, EXPERTS).state, without_last)


def test_experts_may_be_a_plain_list():
    assert close(merge("ta", BASE, list(EXPERTS.values())).state, merged("ta", BASE, EXPERTS).state, atol=0)


# Followers


@pytest.fixture
def followers(monkeypatch):
    """Two more followers: `lift` adds a number, `watch` learns, and notes what it was given."""
    seen = []

    def lift(pretrained, experts, merged, *, scale, by):
        return Merged({name: tensor + scale * by for name, tensor in merged.items()})

    def watch(pretrained, experts, merged, stream, *, seed, split):
        seen.append((list(experts), {name: tensor.clone() for name, tensor in merged.items()}, stream, seed, split))
        return Merged(merged, entropy=(0.5,))

    by, scale = Setting(1.0, "what is added"), Setting(1.0, "its factor")
    learning = {"seed": Setting(7, "random seed"), "split": Setting("test", "split", choices=("test", "train"))}
    rows = {
        "lift": Method("sum", "here", lift, {"by": by, "scale": scale}, follows=True),
        "watch": Method("watching", "here", watch, learning, learns=True, classifies=False, follows=True),
    }
    for name, row in rows.items():
        monkeypatch.setitem(METHODS, name, row)
    monkeypatch.setattr(registry, "FOLLOWERS", ("svc", "rescale", *rows))
    return seen


def test_followers_take_what_stands_before_them(followers):
    stream = make_stream()
    found = merge("tw-adamerging+++lift+watch", BASE, EXPERTS, stream, steps=2, batch_size=4, **{"lift.by": 3})
    before = merge("tw-adamerging++", BASE, EXPERTS, stream, steps=2, batch_size=4)
    lifted = {name: tensor + 3 for name, tensor in before.state.items()}
    ((tasks, given, seen_stream, seed, split),) = followers
    assert close(found.state, lifted)
    assert close(given, lifted)
    assert (tasks, seen_stream, split) == (list(EXPERTS), stream, "test")
    assert seed == 7
    assert found.entropy == (*before.entropy, 0.5)
    assert torch.equal(found.coefficients.values, before.coefficients.values)


def test_settings_go_to_every_part_or_to_the_one_that_is_named(followers):
    chain = find_merge("dare+lift+watch")
    assert list(chain.settings) == ["scale", "drop", "seed", "lift.by", "lift.scale", "watch.seed", "watch.split"]
    everywhere = chain.checked({"scale": "2", "seed": 1})
    assert [everywhere[key] for key in ("scale", "lift.scale", "seed", "watch.seed")] == [2, 2, 1, 1]
    apart = chain.checked({"lift.scale": 4, "scale": 2, "dare.seed": 5})
    assert [apart[key] for key in ("scale", "lift.scale", "seed", "watch.seed")] == [2, 4, 5, 7]
    assert chain.checked(apart) == apart  # what is recorded means the same when it is read
    assert find_merge("tw-adamerging+++watch").checked({"tw_adamerging++.seed": 5})["watch.seed"] == 7
    found = merge("ta+lift", BASE, EXPERTS, **{"ta.scale": 0.5, "by": 2.0})
    assert close(found.state, {n: t + 2 for n, t in merge("ta", BASE, EXPERTS, scale=0.5).state.items()})
    for key in (".scale", "dare.by", "lift.seed", "size", "ties.scale"):
        with pytest.raises(InputError, match=f"unknown setting of dare.lift.watch '{key}'"):
            chain.checked({key: 1})


def test_coefficients_are_for_merges_whose_followers_learn_nothing(followers):
    given = Coefficients(None, None, torch.full((5,), 0.3))
    found = merge("tw-adamerging+lift", BASE, EXPERTS, coefficients=given)
    assert close(found.state, {n: t + 1 for n, t in merge("ta", BASE, EXPERTS).state.items()})
    with pytest.raises(InputError, match="tw-adamerging.watch takes no coefficients"):
        merge("tw-adamerging+watch", BASE, EXPERTS, make_stream(), coefficients=given)
    with pytest.raises(InputError, match="ta.watch learns from images; give it a stream"):
        merge("ta+watch", BASE, EXPERTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svc", r"svc changes a merged model; write it behind a merge, as in ta\+svc"),
        ("ta+scv", r"unknown merge 'ta\+scv' \(did you mean 'ta\+svc'\?\); behind ta\+ can stand: svc"),
        ("ta+", r"unknown merge 'ta\+'.*; behind ta\+ can stand"),
        ("tw-adamerging+", r"unknown merge 'tw-adamerging\+' \(did you mean 'tw-adamerging\+\+'\?\)"),
        ("ta+ties", r"ta\+ties: ties merges experts, and no merged model; behind ta\+ can stand: svc"),
        ("ta+svc+svc", r"svc is there twice"),
        ("traditional-mtl+svc", "traditional-mtl is a checkpoint, not a merge of experts, and nothing can follow it"),
        ("nonsense+svc", "unknown merge 'nonsense.svc'"),
        ("my/model.pt+svc", r"my/model.pt is a merged checkpoint, and nothing can follow it; leave \+svc out"),
        ("+svc", "unknown merge '.svc'"),
        ("", "unknown merge ''"),
    ],
)
def test_names_that_chain_nothing_are_refused(name, message):
    with pytest.raises(InputError, match=message) as caught:
        merge(name, BASE, EXPERTS)
    assert "\n" not in str(caught.value)


def test_svc_divides_a_direction_by_how_often_the_tasks_count_it():
    zero, one = (
        torch.zeros(4, 3),
        torch.diag(torch.tensor([3.0, 2.0, 1.0]))[[0, 1, 2, 2]] * torch.tensor([[1], [1], [1], [0]]),
    )
    base = {"w": zero, "embedding": zero, "b": torch.zeros(3)}
    same = [{"w": one, "embedding": one, "b": torch.ones(3)}] * 2
    summed = merge("ta+svc", base, same, **{"ta.scale": 1.0}).state  # both count every direction twice
    assert close(summed, {"w": one, "embedding": 2 * one, "b": 2 * torch.ones(3)})
    apart = [torch.diag(torch.tensor(d)) for d in ([3.0, 0, 0], [0, 2.0, 0])]
    experts = [{"w": tau} for tau in apart]  # each direction is one task's, and nothing of the other's: 2 / (1 + 1/2)
    found = merge("ta+svc", {"w": torch.zeros(3, 3)}, experts, **{"ta.scale": 1.0}).state["w"]
    assert torch.allclose(found, (apart[0] + apart[1]) * 4 / 3, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_rescaling_finds_the_factor_at_which_the_features_are_the_experts(scale):
    expert = {"task1": EXPERTS["task1"]}
    found = merge("ta+rescale", BASE, expert, make_stream(expert), scale=scale, images=20)
    assert found.chosen == {"rescale.factor": 1 / scale}
    assert close(found.state, EXPERTS["task1"])


def test_rescaling_by_entropy_takes_the_surest_of_all_factors():
    stream = make_stream()
    found = merge("wa+rescale", BASE, EXPERTS, stream, by="entropy", images=20)
    whole, least = merge("wa", BASE, EXPERTS).state, {}
    for factor in FACTORS:
        weights = {n: BASE[n] + factor * (whole[n] - BASE[n]) for n in BASE}
        images = {task: next(stream.take(task, "test", 20, 0))[0] for task in EXPERTS}
        p = {task: stream.logits(weights, task, x).softmax(-1) for task, x in images.items()}
        least[factor] = sum(-(q * q.log()).sum(-1).mean() for q in p.values())
    assert found.chosen == {"rescale.factor": min(least, key=least.get)}
    stream = make_stream(list(EXPERTS)[1:])
    merge("wa+rescale", BASE, EXPERTS, stream, images=20)
    with pytest.raises(InputError, match="task1 has no classifier; use by=distance"):
        merge("wa+rescale", BASE, EXPERTS, stream, by="entropy", images=20)


# TIES, DARE, Breadcrumbs


def flat(a, b=None):
    return torch.cat([(a[n] - (0 if b is None else b[n])).flatten() for n in a])


@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "many equal", "zeros", "tiny"])
def test_the_threshold_is_the_one_that_sorting_gives(keep, kind):
    g = torch.Generator().manual_seed(3)
    tau = {n: torch.randn(s, generator=g) for n, s in {"a": (40, 7), "b": (13,), "c": (5, 5, 5)}.items()}
    change = {"many equal": lambda t: t.round(), "zeros": lambda t: t * (t > 1), "tiny": lambda t: t * 1e-42}
    tau = {n: change.get(kind, lambda t: t)(t) for n, t in tau.items()}
    magnitudes = flat(tau).abs().sort(descending=True).values
    assert magnitude_threshold(tau.items, keep) == magnitudes[max(1, round(keep * len(magnitudes))) - 1].item()


def test_ties_on_identical_task_vectors_is_their_trimmed_sum():
    same = {f"t{i}": EXPERTS["task1"] for i in range(4)}
    update = flat(merged("ties", BASE, same, scale=0.25, keep=0.2).state, BASE)
    tau = flat(EXPERTS["task1"], BASE)
    largest = tau.abs().topk(round(0.2 * len(tau))).indices  # over the whole vector
    expected = torch.zeros_like(tau)
    expected[largest] = tau[largest]
    assert torch.allclose(update, expected, atol=1e-6)


def test_ties_by_hand():
    base = {"w": torch.zeros(5)}
    experts = [{"w": torch.tensor(v)} for v in ([4.0, 3, 0.1, 0, 0], [-1.0, 5, 0, 0.2, 0], [-2.0, 0.1, 0, 0, 3])]
    # Of each expert, two of five entries remain: (4, 3), (-1, 5), (-2 at 0, 3 at 4). Entry 0: 4 - 1 - 2 > 0 elects 4.
    assert merge("ties", base, experts, scale=0.5, keep=0.4).state["w"].tolist() == [2.0, 4.0, 0.0, 0.0, 1.5]


@pytest.mark.parametrize(
    ("tower", "width", "share"),
    [(87_849_216, 512, 0.2583), (86_192_640, 512, 0.2594), (303_966_208, 768, 0.2254)],
    ids=["ViT-B/32", "ViT-B/16", "ViT-L/14"],
)
def test_a_share_of_a_checkpoint_is_a_larger_one_of_its_tower(tower, width, share):
    proj = torch.empty(width, width, device="meta")
    state = {"proj": proj, "rest": torch.empty(tower - proj.numel(), device="meta")}
    assert share_of(state, 0.2, "checkpoint") == pytest.approx(share, abs=5e-5)
    assert share_of(state, 0.2, "tower") == 0.2
    assert share_of(state, 1.0, "checkpoint") == 1.0
    with pytest.raises(InputError, match="have a `proj`; use counted=tower"):
        share_of({"weight": proj}, 0.2, "checkpoint")


def test_ties_keeps_more_of_the_tower_where_a_checkpoint_is_counted():
    base = {"proj": torch.zeros(1, 1), "w": torch.zeros(200_000)}
    expert = {"proj": torch.ones(1, 1), "w": torch.rand(200_000)}
    tower = 200_001
    for counted, entries in (("tower", tower), ("checkpoint", tower + 49_408 + 77 + 1 + 2 + 1)):
        state = merge("ties", base, [expert], counted=counted).state
        assert sum(int(t.count_nonzero()) for t in state.values()) == pytest.approx(0.2 * entries, abs=1)


def test_the_processed_vectors_add_up_to_what_ties_adds():
    summed = {n: torch.zeros(s) for n, s in SHAPES.items()}
    for vector in ties_vectors(BASE, EXPERTS, 0.3, "tower"):
        for name, tau in vector:
            summed[name] += tau
    expected = merged("ties", BASE, EXPERTS, scale=1.0, keep=0.3).state
    assert close({n: BASE[n] + summed[n] for n in BASE}, expected)


def test_dare_drops_the_given_share_and_keeps_the_mean():
    base = {"w": torch.zeros(200, 200)}
    dropped = merge("dare", base, [{"w": torch.ones(200, 200)}], scale=1.0, drop=0.9).state["w"]
    assert dropped.unique().tolist() == pytest.approx([0, 10], rel=1e-6)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.9, abs=0.01)
    other = merge("dare", base, [{"w": torch.ones(200, 200)}], scale=1.0, drop=0.9, seed=1).state["w"]
    assert not torch.equal(dropped, other)


def test_breadcrumbs_by_hand():
    base = {"a": torch.zeros(10), "b": torch.zeros(2, 5)}
    tau = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    expert = {"a": tau, "b": 100 * tau.view(2, 5)}  # each tensor separately
    result = merge("breadcrumbs", base, [expert], scale=1.0, small=0.7, large=0.1).state
    assert result["a"].tolist() == [0.0, 0, 0, 0, 0, 0, 0, -8, 9, 0]
    assert result["b"].flatten().tolist() == [0.0, 0, 0, 0, 0, 0, 0, -800, 900, 0]
    nothing = merge("breadcrumbs", base, [expert], small=0.7, large=0.4).state
    assert not any(t.any() for t in nothing.values())
    by_row = merge("breadcrumbs", base, [expert], scale=1.0, small=0.4, large=0.2, rows=True).state
    assert by_row["a"].tolist() == [0.0, 0, 0, 0, 5, -6, 7, -8, 0, 0]
    assert by_row["b"].tolist() == [[0.0, 0, 300, -400, 0], [0.0, 0, -800, 900, 0]]


# AdaMerging


def test_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5, 1e-9], [0.25, 0.25, 0.5]]))
    expected = (torch.log(torch.tensor(2.0)) + 1.5 * torch.log(torch.tensor(2.0))) / 2
    assert entropy(logits).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("images", [3, 7], ids=["together", "one after the other"])
def test_the_gradient_of_coefficients_is_that_of_finite_differences(layerwise, images, monkeypatch):
    monkeypatch.setattr("probsurgery.pipeline.merging.entropy._PASS_SIZE", 40)
    double = {n: t.double() for n, t in BASE.items()}
    stacked = {n: torch.stack([e[n] - BASE[n] for e in EXPERTS.values()]).double() for n in BASE}
    g = torch.Generator().manual_seed(5)
    free = 0.1 + 0.3 * torch.rand(len(EXPERTS), len(BASE) if layerwise else 1, generator=g, dtype=torch.float64)
    free[0, 0] = -0.2  # beyond the clamp: no gradient
    stream = make_stream(dtype=torch.float64)
    batch = {task: images_of(task, images, torch.float64)[0] for task in EXPERTS}

    def total(values):
        build = blend(double, stacked, values)
        weights = {n: build(n) for n in double}
        return sum(entropy(stream.logits(weights, t, x)) for t, x in batch.items())

    free.requires_grad_()
    mean = add_gradients(blend(double, stacked, free), double, stream, batch)
    assert mean == pytest.approx(total(free).item() / len(EXPERTS), rel=1e-12)
    numeric = torch.zeros_like(free)
    for index in range(free.numel()):
        step = torch.zeros_like(free).view(-1)
        step[index] = 1e-6
        with torch.no_grad():
            up, down = (total(free + sign * step.view_as(free)) for sign in (1, -1))
        numeric.view(-1)[index] = (up - down) / 2e-6
    assert numeric.abs().max() > 1e-2
    assert numeric[0, 0] == free.grad[0, 0] == 0
    assert torch.allclose(free.grad, numeric, atol=1e-7)


def test_a_step_holds_one_copy_of_the_merged_model_and_no_gradients():
    """Every gradient is propagated to the coefficients before the next layer's is computed."""
    stacked = {n: torch.stack([e[n] - BASE[n] for e in EXPERTS.values()]) for n in BASE}
    free = torch.full((len(EXPERTS), 1), 0.3, requires_grad=True)
    gradients = []

    def watched(weights, images):
        for name, weight in weights.items():
            weight.register_hook(
                lambda grad, name=name: gradients.append((name, [n for n, w in weights.items() if w.grad is not None]))
            )
        return forward(weights, images)

    add_gradients(blend(BASE, stacked, free), BASE, make_stream(run=watched), {"task1": images_of("task1", 4)[0]})
    assert {name for name, _ in gradients} == set(BASE)
    assert all(others == [] for _, others in gradients)


@pytest.mark.parametrize(
    "method", ["tw-adamerging", "lw-adamerging", "lw-adamerging++", "adarank", "concrete-ta", "concrete-am"]
)
def test_entropy_falls(method):
    progress = []
    stream = make_stream(progress=lambda done, total, what, **_: progress.append((done, total, what)))
    steps = 150 if method == "concrete-am" else 300
    result = merge(method, BASE, EXPERTS, stream, steps=steps, lr=0.02)
    entropies = result.entropy
    assert len(entropies) == (300 if method != "concrete-am" else 2 * steps)
    assert sum(entropies[-20:]) / 20 < 0.9 * sum(entropies[:20]) / 20
    assert progress[-1][:2] == (steps, steps)
    assert f"entropy {entropies[-1]:.3f}" in progress[-1][2]
    whole = {t: images_of(t, 64)[0] for t in EXPERTS}

    def over_all(weights):
        return sum(entropy(stream.logits(weights, t, x)).item() for t, x in whole.items())

    start = merged("ties" if "++" in method else "ta", BASE, EXPERTS).state
    assert over_all(result.state) < over_all(start)


@pytest.mark.parametrize(("method", "plain"), [("lw-adamerging", "ta"), ("lw-adamerging++", "ties")])
def test_equal_coefficients_are_task_arithmetic(method, plain):
    equal = Coefficients(None, None, torch.full((len(EXPERTS), len(BASE)), 0.3))
    assert close(merge(method, BASE, EXPERTS, coefficients=equal).state, merged(plain, BASE, EXPERTS).state)
    other = Coefficients(None, None, torch.full((len(EXPERTS), len(BASE)), 0.31))
    assert not close(merge(method, BASE, EXPERTS, coefficients=other).state, merged(plain, BASE, EXPERTS).state)


@pytest.mark.parametrize("method", ["tw-adamerging", "lw-adamerging++"])
def test_learned_coefficients_given_back_give_the_same_bytes(method):
    learned = merged(method, BASE, EXPERTS, steps=20, lr=0.05)
    coefficients = learned.coefficients
    assert coefficients.values.shape == ((len(EXPERTS),) if method.startswith("tw") else (len(EXPERTS), len(BASE)))
    assert ((coefficients.values >= 0) & (coefficients.values <= 1)).all()
    assert coefficients.values.std() > 0
    again = merge(method, BASE, EXPERTS, coefficients=coefficients)
    assert all(torch.equal(again.state[n], learned.state[n]) for n in BASE)
    shuffled = dict(sorted(EXPERTS.items(), reverse=True))
    assert close(merge(method, BASE, shuffled, coefficients=coefficients).state, learned.state)


def test_a_nan_entropy_ends_the_merge():
    def broken(weights, images):
        return forward(weights, images) * float("nan")

    with pytest.raises(ProbsurgeryError, match="the entropy is nan in step 0; try a smaller lr"):
        merge("tw-adamerging", BASE, EXPERTS, make_stream(run=broken), steps=2)


# Concrete masks


def test_a_mask_is_the_same_within_a_step_and_differs_in_the_next():
    mask = Mask({"w": torch.zeros(300, 30)}, 0.5, 0, torch.device("cpu"))
    first, again, second, other = (mask.sample("w", step).detach() for step in (0, 0, 1, None))
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    assert torch.equal(other, torch.ones(300, 30))
    assert first.mean().item() == pytest.approx(1, abs=1e-4)
    unscaled = first / first.max()
    # Gumbel-sigmoid with logit 0 and temperature 1/2: sigmoid(2 logit(u)) < 0.1 for u < sigmoid(logit(0.1) / 2) = 1/4
    assert (unscaled < 0.1).float().mean().item() == pytest.approx(0.25, abs=0.02)


# Fisher


def test_fisher_information_of_a_linear_softmax_is_the_closed_form():
    """For logits W x: E[(d log p(y|x) / d W_ij)^2] = p_i (1 - p_i) x_j^2, the sum over y weighted with p(y|x)."""
    torch.manual_seed(0)
    weight, x = torch.randn(CLASSES, D_IN), torch.randn(7, D_IN)
    stream = make_stream(["task1"])
    stream = ImageStream(lambda weights, images: images @ weights["w"].T, stream.classifiers, batches)
    object.__setattr__(stream, "logits", lambda weights, task, images: images @ weights["w"].T)
    p = (x @ weight.T).softmax(-1)
    expected = torch.einsum("ni,nj->ij", p * (1 - p), x**2)
    result = torch.zeros(CLASSES, D_IN)
    for row in range(len(x)):
        for label in range(CLASSES):
            squares = {"w": torch.zeros(CLASSES, D_IN)}
            add_squares(squares, {"w": weight}, stream, "task1", x[row : row + 1], torch.tensor([label]), None)
            result += p[row, label] * squares["w"]
    assert torch.allclose(result, expected, atol=1e-5)
    drawn = {"w": torch.zeros(CLASSES, D_IN)}
    for seed in range(60):
        add_squares(drawn, {"w": weight}, stream, "task1", x, None, torch.Generator().manual_seed(seed))
    assert torch.allclose(drawn["w"] / 60, expected, atol=0.1 * expected.max().item())


def test_fisher_merging_weighs_each_parameter_by_its_information():
    """Against per-sample gradients from torch.func, and the formula."""
    experts = {t: EXPERTS[t] for t in ("task1", "task2")}
    stream = make_stream(experts)
    result = merge("fisher", BASE, experts, stream, images=20, labels=True, normalise=False, floor=0.0, seed=4).state
    weighted, total = (dict.fromkeys(BASE, 0) for _ in range(2))
    for task, expert in experts.items():
        images, labels = next(batches(task, "test", 20, 4))

        def log_p(weights, x, y, task=task):
            return stream.logits(weights, task, x[None])[0].log_softmax(-1).gather(0, y)[0]

        gradients = torch.func.vmap(torch.func.grad(log_p), (None, 0, 0))(expert, images, labels[:, None])
        for n in BASE:
            information = gradients[n].square().mean(0).clamp(min=1e-30)
            weighted[n] = weighted[n] + information * expert[n]
            total[n] = total[n] + information
    assert close(result, {n: weighted[n] / total[n] for n in BASE}, atol=1e-4)
    mean = merged("wa", BASE, experts).state
    assert not close(result, mean, atol=1e-2)
    assert not close(result, merge("fisher", BASE, experts, stream, images=20, seed=4).state, atol=1e-3)


# RegMean


def test_regmean_of_one_linear_layer_is_the_least_squares_answer():
    base = {"w": torch.zeros(D, D_IN)}
    experts = {
        t: {"w": torch.randn(D, D_IN, generator=torch.Generator().manual_seed(i))} for i, t in enumerate(EXPERTS)
    }
    stream = ImageStream(
        lambda weights, x: F.linear(x, weights["w"]), dict.fromkeys(experts, torch.zeros(2, D)), batches
    )
    result = merge("regmean", base, experts, stream, images=100, off_diagonal=1.0).state["w"]  # batches of 64 and 36
    inputs = {t: torch.cat([x for x, _ in stream.take(t, "test", 100, 0)]) for t in experts}
    x = torch.cat([inputs[t] for t in experts]).double()
    y = torch.cat([inputs[t].double() @ experts[t]["w"].double().T for t in experts])
    best = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(result.double(), best, atol=1e-5)
    mean = torch.stack([e["w"] for e in experts.values()]).mean(0)
    assert not torch.allclose(result, mean, atol=0.1)
    diagonal = merge("regmean", base, experts, stream, images=100, off_diagonal=0.0).state["w"]
    weights = {t: inputs[t].square().mean(0) for t in experts}
    expected = sum(weights[t] * experts[t]["w"] for t in experts) / sum(weights.values())
    assert torch.allclose(diagonal, expected, atol=1e-5)


def test_grams_are_summed_for_linear_layers_and_plain_products_only():
    watch = InputGrams(BASE)
    x = images_of("task1", 9)[0]
    with watch:
        forward(BASE, x)
        x @ torch.ones(D_IN, 2)  # not a weight
    inner = F.relu(F.linear(x, BASE["up.weight"], BASE["up.bias"])).double()
    assert watch.grams.keys() == {"up.weight", "proj"}
    assert watch.transposed == {"up.weight"}
    assert torch.allclose(watch.grams["up.weight"], x.double().T @ x.double())
    assert torch.allclose(watch.grams["proj"], inner.T @ inner, atol=1e-6)


def test_regmean_finds_every_linear_map_of_the_tower():
    from probsurgery.pipeline.models.encoders import get_encoder
    from probsurgery.pipeline.models.sources import Weights

    weights = Weights("mini").pretrained()
    watch = InputGrams(weights)
    with torch.no_grad(), watch:
        get_encoder("mini").functional()(weights, torch.randn(2, 3, 48, 48))
    expected = {n for n, t in weights.items() if t.ndim == 2 and n not in ("class_embedding", "positional_embedding")}
    assert watch.grams.keys() == expected
    assert watch.transposed == expected - {"proj"}
    assert all(len(watch.grams[n]) == weights[n].shape[n != "proj"] for n in expected)


# Requests


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="unknown merge 'tise' .*did you mean 'ties'.*; choose from: wa, ta, ties"):
        merge("tise", BASE, EXPERTS)
    with pytest.raises(InputError, match="unknown setting of ta 'keep'; choose from: scale"):
        merge("ta", BASE, EXPERTS, keep=0.2)
    with pytest.raises(InputError, match="unknown setting of wa 'scale'; choose from: .it has none."):
        merge("wa", BASE, EXPERTS, scale=0.2)
    with pytest.raises(InputError, match="no expert"):
        merge("wa", BASE, [])
    with pytest.raises(InputError, match="differ in the key 'proj'"):
        merge("wa", BASE, [{n: BASE[n] for n in ("up.weight", "up.bias")}])
    with pytest.raises(InputError, match="fisher learns from images; give it a stream"):
        merge("fisher", BASE, EXPERTS)
    with pytest.raises(InputError, match="ta takes no coefficients"):
        merge("ta", BASE, EXPERTS, coefficients=Coefficients(None, None, torch.ones(5)))
    with pytest.raises(InputError, match="traditional-mtl is a checkpoint, not a merge"):
        merge("traditional-mtl", BASE, EXPERTS)


@pytest.mark.parametrize(
    ("method", "setting", "value", "message"),
    [
        ("ta", "scale", "x", "the setting scale is 'x'; it must be a number"),
        ("ta", "scale", "nan", "it must be a number"),
        ("ta", "scale", "inf", "it must be a number"),
        ("ties", "keep", "0", "it must be a number from 1e-09 to 1"),
        ("ties", "keep", "1.5", "it must be a number from 1e-09 to 1"),
        ("dare", "seed", "0.5", "it must be a whole number from 0 to"),
        ("dare", "drop", "1", "it must be a number from 0 to 0.9999"),
        ("fisher", "labels", "maybe", "it must be true or false"),
        ("fisher", "images", "0", "it must be a whole number from 1"),
        ("tw-adamerging", "split", "validation", "it must be test or train"),
        ("tw-adamerging", "steps", True, "it must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(method, setting, value, message):
    with pytest.raises(InputError, match=message):
        METHODS[method].checked(method, {setting: value})


def test_settings_may_be_text():
    assert METHODS["fisher"].checked("fisher", {"labels": "True", "images": "12", "floor": "0"}) == {
        "images": 12,
        "split": "test",
        "seed": 0,
        "labels": True,
        "normalise": True,
        "floor": 0.0,
    }


def test_the_table_has_all_methods_of_the_papers_tables():
    import csv
    from pathlib import Path

    import probsurgery.pipeline

    table = Path(probsurgery.pipeline.__file__).parent / "analysis" / "published.csv"
    with table.open(newline="") as file:
        rows = {row["method"].partition("+")[0].partition(" (")[0] for row in csv.DictReader(file)}
    assert {"fisher", "regmean", "traditional-mtl", "concrete-am", "lw-adamerging"} <= rows
    assert rows - {"pretrained", "individual", "probsurgery"} <= METHODS.keys()
