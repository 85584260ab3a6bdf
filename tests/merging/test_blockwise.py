"""Merges that go through an encoder block by block, against plain computations on a small transformer-like network."""

import pytest
import torch
from torch.nn import functional as F

from probsurgery.pipeline.merging.featcal import _layer_inputs
from probsurgery.pipeline.merging.layers import blocks
from probsurgery.pipeline.merging.registry import merge
from probsurgery.pipeline.merging.vectors import ImageStream

TOKENS, WIDTH, HIDDEN, D, IMAGES = 3, 4, 7, 5, 70  # images: two batches
SHAPES = {"embed": (WIDTH, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "proj": (WIDTH, D)}
for i in range(2):
    SHAPES |= {f"blocks.{i}.ln.weight": (WIDTH,), f"blocks.{i}.ln.bias": (WIDTH,)}
    SHAPES |= {f"blocks.{i}.up.weight": (HIDDEN, WIDTH), f"blocks.{i}.up.bias": (HIDDEN,)}
    SHAPES |= {f"blocks.{i}.down": (HIDDEN, WIDTH)}


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


BASE, EXPERTS = state(0), {f"task{i}": state(i) for i in range(1, 4)}


def block_inputs(w, i, h):
    """By layer of block i, what it is given for tokens h (N, L, d); and the block's output."""
    z = F.layer_norm(h, (WIDTH,))
    x = F.layer_norm(h, (WIDTH,), w[f"blocks.{i}.ln.weight"], w[f"blocks.{i}.ln.bias"])
    a = F.relu(F.linear(x, w[f"blocks.{i}.up.weight"], w[f"blocks.{i}.up.bias"]))
    return {"ln.weight": z, "up.weight": x, "down": a}, h + a @ w[f"blocks.{i}.down"]


def between(h):
    """Mixes tokens without parameters."""
    return h + h.mean(1, keepdim=True)


def forward(w, images):
    h = images @ w["embed"]
    for i in range(2):
        h = block_inputs(w, i, between(h) if i == 0 else h)[1]
    return F.layer_norm(h[:, 0], (WIDTH,), w["norm.weight"], w["norm.bias"]) @ w["proj"]


def images_of(task):
    g = torch.Generator().manual_seed(sum(map(ord, task)))
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=g) + torch.randn(WIDTH, generator=g)


def batches(task, split, size, seed):
    yield from ((batch, torch.zeros(len(batch))) for batch in images_of(task).split(size))


STREAM = ImageStream(forward, {}, batches)


def close(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[n].double(), b[n].double(), atol=atol) for n in a)


def doubled(state):
    return {name: tensor.double() for name, tensor in state.items()}


def plain_featcal(base, experts, merged, ridge, anchor, blend):
    """The formulas, layer by layer and in float64, on whole features."""
    base, experts, found = doubled(base), {t: doubled(e) for t, e in experts.items()}, doubled(merged)
    student = {t: between(images_of(t).double() @ found["embed"]) for t in experts}
    teacher = {t: between(images_of(t).double() @ experts[t]["embed"]) for t in experts}
    for i in range(2):
        token = torch.ones(TOKENS) if i == 0 else torch.tensor([1, 0.01, 0.01])
        weight = token.double().repeat(IMAGES, 1)
        seen = {t: block_inputs(found, i, h)[0] for t, h in student.items()}
        wanted = {t: block_inputs(experts[t], i, h) for t, h in teacher.items()}
        prior = {n: anchor * found[n] + (1 - anchor) * base[n] for n in base}
        new = {}
        for layer, bias in (("up.weight", "up.bias"), ("down", None)):
            name = f"blocks.{i}.{layer}"
            grams, products, shifts, total = 0, 0, 0, 0
            for t in experts:
                xs, xe, w = seen[t][layer].flatten(0, 1), wanted[t][0][layer].flatten(0, 1), weight.flatten()
                xt = blend * xe + (1 - blend) * xs
                s, k = (
                    torch.einsum("n,ni,nj->ij", w, xs, xs) / w.sum(),
                    torch.einsum("n,ni,nj->ij", w, xs, xt) / w.sum(),
                )
                inward = experts[t][name].T if layer == "up.weight" else experts[t][name]
                grams, products = grams + s / s.norm(), products + k @ inward / s.norm()
                shifts += ((w @ xt) / w.sum() @ inward) / s.norm()
                if bias is not None:
                    shifts += experts[t][f"blocks.{i}.{bias}"] / s.norm()
                total += 1 / s.norm()
            inward_prior = prior[name].T if layer == "up.weight" else prior[name]
            solved = torch.linalg.inv(grams + ridge * torch.eye(len(grams))) @ (products + ridge * inward_prior)
            new[name] = solved.T if layer == "up.weight" else solved
            if bias is not None:
                for t in experts:
                    xs, w = seen[t][layer].flatten(0, 1), weight.flatten()
                    s = torch.einsum("n,ni,nj->ij", w, xs, xs) / w.sum()
                    shifts = shifts - ((w @ xs) / w.sum() @ solved) / s.norm()
                name = f"blocks.{i}.{bias}"
                new[name] = (shifts + ridge * prior[name]) / (total + ridge)
        for d in range(WIDTH):  # gamma z + beta of one dimension, by its normal equations
            matrix, right = ridge * torch.eye(2).double(), torch.zeros(2).double()
            names = [f"blocks.{i}.ln.{kind}" for kind in ("weight", "bias")]
            right += ridge * torch.stack([prior[n][d] for n in names])
            for t in experts:
                z = torch.stack([seen[t]["ln.weight"][..., d].flatten(), torch.ones(IMAGES * TOKENS).double()], 1)
                second = z.T @ (weight.flatten()[:, None] * z) / weight.sum()
                matrix, right = matrix + second, right + second @ torch.stack([experts[t][n][d] for n in names])
            for name, value in zip(names, torch.linalg.solve(matrix, right), strict=True):
                new.setdefault(name, found[name].clone())[d] = value
        found |= new
        student = {t: block_inputs(found, i, h)[1] for t, h in student.items()}
        teacher = {t: output for t, (_, output) in wanted.items()}
    return found


@pytest.mark.parametrize("settings", [(0.05, 2.2, 0.25), (1.0, 1.0, 0.9)], ids=["usual", "other"])
def test_featcal_is_its_formulas(settings):
    given = dict(zip(("ridge", "anchor", "blend"), settings, strict=True))
    ta = merge("ta", BASE, EXPERTS).state
    result = merge("ta+featcal", BASE, EXPERTS, STREAM, images=IMAGES, **given).state
    expected = plain_featcal(BASE, EXPERTS, ta, *settings)
    assert close(result, expected, atol=1e-4)
    refitted = {name for name in BASE if not torch.equal(result[name], ta[name])}
    assert refitted == {name for name in BASE if name.startswith("blocks.")}
    beyond = merge("ta+featcal", BASE, EXPERTS, STREAM, images=IMAGES, outside=True, **given).state
    refitted = {name for name in BASE if not torch.equal(beyond[name], ta[name])}
    assert refitted == set(BASE)


def test_featcal_leaves_a_model_that_all_experts_agree_with():
    same = dict.fromkeys(EXPERTS, EXPERTS["task1"])
    settings = {"images": IMAGES, "anchor": 1.0, "outside": True}
    assert close(merge("wa+featcal", BASE, same, STREAM, **settings).state, EXPERTS["task1"], atol=1e-4)
    drawn = merge("wa+featcal", BASE, same, STREAM, images=IMAGES, ridge=1e8).state  # to the anchor alone
    names = [name for name in BASE if name.startswith("blocks.0")]
    anchor = {name: 2.2 * EXPERTS["task1"][name] - 1.2 * BASE[name] for name in names}
    assert close({name: drawn[name] for name in names}, anchor, atol=1e-4)


def test_regmean_plus_plus_takes_inputs_from_the_merged_blocks_below():
    """Against the formula on inputs that hand-written blocks give."""
    result = merge("regmean++", BASE, EXPERTS, STREAM, images=IMAGES, off_diagonal=0.8).state
    experts = {t: doubled(e) for t, e in EXPERTS.items()}
    found = {name: torch.stack([e[name] for e in experts.values()]).mean(0) for name in BASE}

    def fit(name, inputs, transposed):
        total, products = 0, 0
        for t, x in inputs.items():
            gram = x.flatten(0, -2).T @ x.flatten(0, -2)
            gram = torch.where(torch.eye(len(gram)).bool(), gram, 0.8 * gram)
            total = total + gram
            products = products + gram @ (experts[t][name].T if transposed else experts[t][name])
        solved = torch.linalg.inv(total) @ products
        return solved.T if transposed else solved

    images = {t: images_of(t).double() for t in experts}
    found["embed"] = fit("embed", images, transposed=False)
    tokens = {t: between(x @ found["embed"]) for t, x in images.items()}
    for i in range(2):
        seen = {t: block_inputs(experts[t], i, h)[0] for t, h in tokens.items()}
        for layer in ("up.weight", "down"):
            inputs = {t: by_layer[layer] for t, by_layer in seen.items()}
            found[f"blocks.{i}.{layer}"] = fit(f"blocks.{i}.{layer}", inputs, layer == "up.weight")
        tokens = {t: block_inputs(found, i, h)[1] for t, h in tokens.items()}
    norms = {t: (experts[t]["norm.weight"], experts[t]["norm.bias"]) for t in experts}
    last = {t: F.layer_norm(h[:, 0], (WIDTH,), *norms[t]) for t, h in tokens.items()}
    found["proj"] = fit("proj", last, transposed=False)
    assert close(result, found, atol=1e-4)
    assert not close(result, merge("regmean", BASE, EXPERTS, STREAM, images=IMAGES, off_diagonal=0.8).state, atol=1e-2)


def test_blocks_are_found_in_the_order_of_use():
    found = blocks(STREAM, dict(reversed(BASE.items())), images_of("task1")[:1])
    assert [block.number for block in found] == ["", "blocks.0", "blocks.1", ""]
    layers = [["embed"], *([f"blocks.{i}.{n}" for n in ("ln.weight", "up.weight", "down")] for i in range(2))]
    assert [list(block.layers) for block in found] == [*layers, ["norm.weight", "proj"]]
    assert [block.ends for block in found] == [False, False, True, True]
    assert found[0].names == ("embed",)
    assert set(found[1].names) == {name for name in BASE if name.startswith("blocks.0.")}
    assert set(found[3].names) == {"norm.weight", "norm.bias", "proj"}
    assert found[2].transposed == {"blocks.1.up.weight"}
    assert found[2].later == {"norm.weight", "proj"}


def test_in_the_last_block_only_keys_and_values_of_other_tokens_matter():
    from probsurgery.pipeline.models.encoders import get_encoder
    from probsurgery.pipeline.models.sources import Weights

    weights, images = dict(Weights("mini").pretrained()), torch.randn(2, 3, 48, 48)
    stream = ImageStream(get_encoder("mini").functional(), {}, batches)
    (last,) = (block for block in blocks(stream, weights, images) if block.ends and block.number)
    inputs, gradients = _layer_inputs(stream, weights, images, last, backward=True)
    plain, none = _layer_inputs(stream, weights, images, last, backward=False)
    assert close(inputs, plain)
    assert not none
    matters = {name.partition(".3.")[2]: g.abs().sum(1) > 0 for name, g in gradients.items()}
    queries, keys, values = gradients["transformer.resblocks.3.attn.in_proj_weight"].chunk(3, 1)
    assert [int(part.any(1).sum()) for part in (queries, keys, values)] == [2, 34, 34]  # of two images, 17 tokens each
    others = {name: int(rows.sum()) for name, rows in matters.items()}
    assert others == {
        "ln_1.weight": 34,
        "attn.in_proj_weight": 34,
        "attn.out_proj.weight": 2,
        "ln_2.weight": 2,
        "mlp.c_fc.weight": 2,
        "mlp.c_proj.weight": 2,
    }
