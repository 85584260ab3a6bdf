"""Merges by singular vectors, against plain implementations of their formulas with full SVDs in numpy."""

import numpy as np
import pytest
import torch

from probsurgery.pipeline.merging.registry import merge
from probsurgery.pipeline.merging.spectral import factors, polar
from probsurgery.pipeline.merging.vectors import Machine, by_tensor

SHAPES = {
    "positional_embedding": (9, 24),
    "proj": (24, 12),
    "conv1.weight": (24, 3, 2, 2),
    "blocks.0.attn.in_proj_weight": (72, 24),
    "blocks.0.attn.out_proj.weight": (24, 24),
    "blocks.0.mlp.c_fc.weight": (40, 24),
    "blocks.0.mlp.c_proj.weight": (24, 40),
    "blocks.0.ln_1.weight": (24,),
}
T = 4
SVD = np.linalg.svd


def random_state(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


BASE = random_state(0)
EXPERTS = [{n: BASE[n] + tau for n, tau in random_state(seed, 0.1).items()} for seed in range(1, T + 1)]


def plain_polar(columns):
    left, _, right = SVD(columns, full_matrices=False)
    return left @ right


def joined(parts, *, isotropic):
    """polar(U) S polar(V)^T of (U, S, V^T) side by side."""
    left = np.concatenate([part[0] for part in parts], 1)
    sizes = np.concatenate([part[1] for part in parts])
    right = np.concatenate([part[2] for part in parts], 0)
    if isotropic:
        sizes = np.full_like(sizes, sizes.mean())
    return plain_polar(left) @ np.diag(sizes) @ plain_polar(right)


def plain_tsv_m(taus):
    kept = min(taus[0].shape) // T
    found = [SVD(tau, full_matrices=False) for tau in taus]
    return joined([(u[:, :kept], s[:kept], v[:kept]) for u, s, v in found], isotropic=False)


def plain_iso_c(taus):
    left, sizes, right = SVD(sum(taus), full_matrices=False)
    return sizes.mean() * left @ right


def plain_iso_cts(taus):
    side = min(taus[0].shape)
    each = round((side - int(0.8 * side)) / T)
    common = side - each * T
    left, sizes, right = (SVD(sum(taus), full_matrices=False)[i] for i in range(3))
    parts = []
    for tau in taus:
        u, s, v = SVD(tau - left[:, :common] @ left[:, :common].T @ tau, full_matrices=False)
        parts.append((u[:, :each], s[:each], v[:each]))
    return joined([*parts, (left[:, :common], sizes[:common], right[:common])], isotropic=True)


def plain_wudi(taus, keep=None, time=None):
    squares = [np.sum(tau**2) for tau in taus]
    gram = sum(tau.T @ tau / square for tau, square in zip(taus, squares, strict=True))
    wanted = sum(tau @ tau.T @ tau / square for tau, square in zip(taus, squares, strict=True))
    values, vectors = np.linalg.eigh(gram)
    rank = np.ceil(np.sqrt(values.clip(0)).sum() ** 2 / values.sum()) if keep is None else np.ceil(keep * len(values))
    filters = (np.arange(len(values)) >= len(values) - rank) * (1 if time is None else 1 - np.exp(-values * time))
    inverse = vectors @ np.diag(filters / values) @ vectors.T
    return sum(taus) + wanted @ inverse - sum(taus) @ vectors @ np.diag(filters) @ vectors.T


def plain_svc(update, taus, alpha):
    left, sizes, right = SVD(update, full_matrices=False)
    factor = []
    for u, size, v in zip(left.T, sizes, right, strict=True):
        shares = [(size * v) @ (u @ tau) / np.sum((u @ tau) ** 2) for tau in taus]
        factor.append(len(taus) / sum(max(alpha, share) for share in shares))
    return left @ np.diag(factor * sizes) @ right


def expected(plain, settings, is_merged=lambda name: True):
    """theta_0 plus the scaled update of each tensor; without a formula, the mean."""
    found = {}
    for name, theta in BASE.items():
        taus = [(expert[name] - theta).double().numpy() for expert in EXPERTS]
        update = sum(taus) / T
        if theta.ndim == 2 and is_merged(name):
            count = 3 if settings.get("qkv") == "apart" and "in_proj" in name else 1
            update = np.concatenate([plain(part) for part in zip(*(np.split(tau, count) for tau in taus), strict=True)])
        found[name] = theta.double().numpy() + settings.get("scale", 1.0) * update
    return found


def differ(found, wanted):
    """The largest difference in any tensor."""
    assert list(found) == list(wanted)
    return max(
        float(np.abs(tensor.double().numpy() - np.asarray(wanted[name])).max()) for name, tensor in found.items()
    )


def in_block(name):
    return name.startswith("blocks")


@pytest.mark.parametrize("settings", [{}, {"scale": 0.5, "qkv": "apart"}], ids=["default", "apart"])
@pytest.mark.parametrize(
    ("method", "plain", "is_merged"),
    [
        ("tsv-m", plain_tsv_m, lambda name: True),
        ("iso-c", plain_iso_c, lambda name: True),
        ("iso-cts", plain_iso_cts, lambda name: True),
        ("wudi", plain_wudi, in_block),
    ],
)
def test_merges_are_those_of_their_formulas(method, plain, is_merged, settings):
    found = merge(method, BASE, EXPERTS, **settings).state
    assert differ(found, expected(plain, settings, is_merged)) < 1e-6


def test_wudi_with_a_filter_is_swudi():
    found = merge("wudi", BASE, EXPERTS, keep=0.65, time=30.0).state
    assert differ(found, expected(lambda taus: plain_wudi(taus, 0.65, 30.0), {}, in_block)) < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_svc_is_that_of_its_formula(alpha):
    merged = merge("ta", BASE, EXPERTS).state
    wanted = {}
    for name, theta in BASE.items():
        wanted[name] = merged[name].double().numpy()
        if theta.ndim == 2 and "embed" not in name:
            taus = [(expert[name] - theta).double().numpy() for expert in EXPERTS]
            update = (merged[name].double() - theta.double()).numpy()
            wanted[name] = theta.double().numpy() + plain_svc(update, taus, alpha or 1 / T)
    assert differ(merge("ta+svc", BASE, EXPERTS, alpha=alpha).state, wanted) < 1e-6


@pytest.mark.parametrize("method", ["tsv-m", "iso-c", "iso-cts", "wudi", "wa+svc"])
def test_updates_grow_with_the_task_vectors(method):
    twice = [{n: BASE[n] + 2 * (expert[n] - BASE[n]) for n in BASE} for expert in EXPERTS]
    once, found = merge(method, BASE, EXPERTS).state, merge(method, BASE, twice).state
    assert differ(found, {n: (BASE[n] + 2 * (once[n] - BASE[n])).numpy() for n in BASE}) < 1e-5


def test_equal_experts_share_their_directions():
    found = merge("tsv-m", BASE, EXPERTS[:1] * 3).state["blocks.0.attn.out_proj.weight"]
    tau = (EXPERTS[0]["blocks.0.attn.out_proj.weight"] - BASE["blocks.0.attn.out_proj.weight"]).double().numpy()
    u, s, v = SVD(tau)
    kept = 24 // 3
    wanted = BASE["blocks.0.attn.out_proj.weight"].double().numpy() + u[:, :kept] * s[:kept] @ v[:kept]
    assert np.abs(found.double().numpy() - wanted).max() < 1e-6  # each third once, and no other direction


# Ranks


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 3e-7])
def test_singular_vectors_of_ill_conditioned_matrices(shape, smallest):
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(side, 20, generator=generator, dtype=torch.float64)).Q for side in shape)
    sizes = torch.logspace(0, float(np.log10(smallest)), 20, dtype=torch.float64)
    left, found, right = factors(u * sizes @ v.T, 0.0)
    assert torch.allclose(found, sizes, rtol=1e-6)
    for vectors, true in ((left, u), (right, v)):
        assert torch.allclose(vectors.T @ vectors, torch.eye(20, dtype=torch.float64), atol=1e-6)
        assert torch.allclose((vectors.T @ true).abs(), torch.eye(20, dtype=torch.float64), atol=1e-6)
    top = factors(u * sizes @ v.T, 0.0, 3)
    assert all(
        torch.allclose(a.abs(), b.abs(), atol=1e-9) for a, b in zip(top, (u[:, :3], sizes[:3], v[:, :3]), strict=True)
    )


def test_nothing_has_no_singular_vectors():
    assert [found.shape for found in factors(torch.zeros(4, 3), 0.0)] == [(4, 0), (0,), (3, 0)]
    assert polar(torch.zeros(4, 0, dtype=torch.float64)).shape == (4, 0)


def low_rank_experts(dtype, size, rank):
    """A base and experts that differ by products of thin matrices, stored in `dtype`; and the exact task vectors."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(64, 48, generator=generator).to(dtype).float()
    taus = [
        size * torch.randn(64, rank, generator=generator) @ torch.randn(rank, 48, generator=generator) for _ in range(3)
    ]
    return {"w": base}, [{"w": (base + tau).to(dtype).float()} for tau in taus], [tau.double().numpy() for tau in taus]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experts_of_low_rank_are_merged_at_their_rank(dtype):
    size = 3e-3 if dtype == torch.float32 else 0.3
    base, experts, taus = low_rank_experts(dtype, size, rank=2)
    u, s, v = SVD(sum(taus))
    isotropic = s[:6].mean() * u[:, :6] @ v[:6]  # and not the mean over 48 values
    kept = [SVD(tau) for tau in taus]
    together = joined([(u[:, :2], s[:2], v[:2]) for u, s, v in kept], isotropic=False)
    for method, wanted in (("iso-c", isotropic), ("tsv-m", together)):
        update = (merge(method, base, experts).state["w"] - base["w"]).double()
        assert torch.linalg.matrix_rank(update, atol=size / 30, rtol=0) == 6
        assert np.linalg.norm(update.numpy() - wanted) < 20 * torch.finfo(dtype).eps * np.linalg.norm(base["w"].numpy())
    update = (merge("iso-cts", base, experts).state["w"] - base["w"]).double()
    assert torch.linalg.matrix_rank(update, atol=size / 30, rtol=0) <= 6


def test_ranks_of_full_fine_tuning_are_full():
    base = {"w": torch.randn(64, 48, generator=torch.Generator().manual_seed(4))}
    small = [{"w": base["w"] + 1e-4 * torch.randn(64, 48, generator=torch.Generator().manual_seed(i))} for i in (5, 6)]
    update = (merge("iso-c", base, small).state["w"] - base["w"]).double()
    values = torch.linalg.svdvals(update)
    assert values[-1] > 0.98 * values[0]


# Streaming


def test_task_vectors_come_by_tensor_in_order_and_few_at_a_time():
    opened = []

    class Opened(dict):
        def items(self):
            raise AssertionError("experts are opened one at a time")

        def values(self):
            for expert in EXPERTS:
                opened.append(1)
                yield expert

    seen = dict(by_tensor(BASE, Opened(enumerate(EXPERTS))))
    assert list(seen) == list(BASE)
    assert all(torch.equal(seen[n][2], EXPERTS[2][n] - BASE[n]) for n in BASE)
    assert T < len(opened) <= 3 * T * T


def test_progress_is_told_by_tensor():
    told = []
    machine = Machine(progress=lambda done, total, what="", *, unit=None: told.append((done, total, what, unit)))
    merge("iso-c+svc", BASE, EXPERTS, machine=machine)
    assert told[:2] == [(0, 8, "positional_embedding", "tensors"), (1, 8, "proj", "tensors")]
    assert len(told) == 2 * len(BASE)


# Consensus


def test_consensus_by_hand():
    base = {"w": torch.zeros(5)}
    taus = ([1.0, 1.0, 1.0, 0.1, 0.0], [1.0, 0.0, -1.0, 5.0, 0.0], [1.0, 0.0, 0.2, 0.0, 0.0])
    experts = [{"w": torch.tensor(tau)} for tau in taus]
    found = merge("consensus-ta", base, experts, scale=1.0, threshold=0.4).state["w"]
    # 1: all three; 2: one task alone; 3: |1| > .4 * .8 and |-1| > .4 * 1.2, so two; 4: one; 5: none.
    assert torch.allclose(found, torch.tensor([3.0, 0.0, 0.2, 0.0, 0.0]))
    found = merge("consensus-ta", base, experts, scale=0.5, threshold=0.4, least=1).state["w"]
    assert torch.allclose(found, torch.tensor([1.5, 0.5, 0.1, 2.55, 0.0]))
    assert torch.equal(merge("consensus-ta", base, experts[:1], scale=1.0).state["w"], experts[0]["w"])
