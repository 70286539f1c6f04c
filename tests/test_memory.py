"""CRD's memory: which samples it contrasts with, and what its banks hold."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from crd.memory import ContrastMemory, draws_for
from distiller_zoo import DistillError, create_distiller

BALANCED = [c for c in range(4) for _ in range(6)]  # 24 samples, 18 of other classes
UNBALANCED = [0] * 12 + [1] * 5 + [2] * 2 + [3]  # 20 samples; 8, 15, 18 and 19 of other classes
GAPS = [7, 3, 3, 7, 12, 12, 12, 3, 7, 0, 0, 12]  # unsorted; most labels are no class


def memory(labels, K, mode="exact", seed=0, feat_dim=6):
    torch.manual_seed(seed)
    return ContrastMemory(labels, feat_dim, K, 0.07, 0.5, mode)


def draws(bank, n, index=None):
    """n draws for every sample (or for those of index): [(sample, positive, negatives)]."""
    index = torch.arange(bank.n_data).flip(0) if index is None else index
    return [
        (i, row[0], row[1:]) for _ in range(n) for i, row in zip(index.tolist(), bank.draw(index).tolist(), strict=True)
    ]


def others(labels, i):
    return [j for j, c in enumerate(labels) if c != labels[i]]


@pytest.mark.parametrize(
    "labels", [BALANCED, UNBALANCED, GAPS, BALANCED[::-1]], ids=["equal", "unequal", "gaps", "rev"]
)
@pytest.mark.parametrize("K", [1, 4, 8])
@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_own_class_is_never_a_negative_and_none_comes_twice(labels, K, mode):
    for i, positive, negative in draws(memory(labels, K, mode), 40):
        assert set(negative) <= set(others(labels, i))
        assert len(set(negative)) == K  # every sample of these sets has at least 8 others
        assert labels[positive] == labels[i]
        assert mode == "relax" or positive == i


@pytest.mark.parametrize("labels", [BALANCED, UNBALANCED, GAPS], ids=["equal", "unequal", "gaps"])
def test_more_negatives_than_there_are(labels):
    """Then they are drawn with replacement, and each comes up."""
    seen = {i: Counter() for i in range(len(labels))}
    for i, _, negative in draws(memory(labels, 50), 20):
        assert len(negative) == 50
        seen[i].update(negative)
    for i, count in seen.items():
        assert sorted(count) == others(labels, i)


def test_only_the_samples_with_too_few_others_repeat():
    """K = 12: class 0 has 8 others and repeats them; the rest have 15, 18, 19 and do not."""
    repeated = Counter()
    for i, _, negative in draws(memory(UNBALANCED, 12), 100):
        assert len(negative) == 12 and set(negative) <= set(others(UNBALANCED, i))
        repeated[UNBALANCED[i]] += len(set(negative)) < 12
    assert repeated[0] == 1200 and repeated[1] == repeated[2] == repeated[3] == 0
    exact = memory(UNBALANCED, 19)  # as many as class 3 has: it alone does not repeat
    for i, _, negative in draws(exact, 5):
        assert (len(set(negative)) == 19) == (UNBALANCED[i] == 3)


@pytest.mark.parametrize(
    ("labels", "K"), [(BALANCED, 5), (BALANCED, 18), (BALANCED, 30), (UNBALANCED, 6), (UNBALANCED, 12), (GAPS, 3)]
)
def test_negatives_are_uniform(labels, K):
    n = 1500
    for i, count in enumerate(counts(memory(labels, K, seed=5), n)):
        m = len(others(labels, i))
        if m == K:  # without replacement: each, every time
            assert set(count.values()) == {n}
            continue
        # without replacement a place's count varies less, by (m - K) / (m - 1)
        uniform(count, m, n * K / m, (m - K) / (m - 1) if m > K else 1)


def uniform(count, m, expected, variance=1.0):
    """Chi-square of m counts, neither too large nor too small to be chance."""
    chi2 = (sum((v - expected) ** 2 for v in count.values()) + (m - len(count)) * expected**2) / expected / variance
    assert 1e-6 < stats.chi2.sf(chi2, m - 1) < 1 - 1e-6


def counts(bank, n):
    found = [Counter() for _ in range(bank.n_data)]
    for i, _, negative in draws(bank, n):
        found[i].update(negative)
    return found


def test_pairs_of_negatives_are_uniform():
    """Not only every place alike, but every two places together."""
    bank, pairs, n = memory([0, *[1] * 6], 2, seed=1), Counter(), 6000
    for _, _, negative in draws(bank, n, torch.tensor([0])):
        pairs[tuple(sorted(negative))] += 1
    uniform(pairs, 15, n / 15)


def test_relax_draws_every_sample_of_the_class_alike():
    bank, n = memory(GAPS, 2, "relax", seed=2), 2000
    found = [Counter() for _ in GAPS]
    for i, positive, _ in draws(bank, n):
        found[i][positive] += 1
    for i, count in enumerate(found):
        own = [j for j, c in enumerate(GAPS) if c == GAPS[i]]
        assert sorted(count) == own
        uniform(count, len(own), n / len(own))


@pytest.mark.parametrize(("mode", "K"), [("exact", 5), ("relax", 5), ("relax", 12), ("exact", 40)])
def test_same_seed_same_draws(mode, K):
    """Whatever else draws from the global generator, or moves it."""
    a, b, other = memory(UNBALANCED, K, mode), memory(UNBALANCED, K, mode), memory(UNBALANCED, K, mode, seed=1)
    index = torch.arange(20)
    first = [a.draw(index) for _ in range(3)]
    before = torch.get_rng_state()
    torch.manual_seed(77)
    second = []
    for _ in range(3):
        torch.rand(100)
        second.append(b.draw(index))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(torch.stack(first), torch.stack([other.draw(index) for _ in range(3)]))
    assert not torch.equal(first[0], first[1])
    torch.set_rng_state(before)
    a.draw(index)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched


@pytest.mark.parametrize("drawn_before", [0, 3])
def test_the_generator_goes_on_where_it_was(drawn_before):
    """Through a checkpoint file, into a memory that was built and used otherwise."""
    bank, index = memory(UNBALANCED, 5), torch.arange(20)
    for _ in range(drawn_before):
        bank.draw(index)
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    want = [bank.draw(index) for _ in range(3)]
    for used in (False, True):
        file.seek(0)
        other = memory(UNBALANCED, 5, seed=9)
        if used:
            other.draw(index)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert all(torch.equal(other.draw(index), w) for w in want)


def embeddings(n, seed, dim=6):
    noise = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=noise), dim=1)


def test_update_of_opposite_vectors_stays_finite():
    bank = memory(BALANCED, 5)
    index, v = torch.tensor([3]), embeddings(1, 0)
    bank.update(index, v, v)
    bank.memory_v1[3] = -v[0]
    bank.update(index, v, v)  # half of each: nothing is left to normalise
    assert bank.memory_v1.isfinite().all()


def test_gradients_reach_the_embeddings_and_not_the_banks():
    bank = memory(BALANCED, 5)
    v_s, v_t = embeddings(2, 0).requires_grad_(), embeddings(2, 1).requires_grad_()
    p_s, p_t = bank(v_s, v_t, bank.draw(torch.tensor([0, 8])))
    p_s.log().sum().backward(retain_graph=True)
    assert v_s.grad.any() and v_t.grad is None
    p_t.log().sum().backward()
    assert v_t.grad.any() and not any(b.requires_grad for b in bank.buffers())


def test_one_class_only_is_refused():
    """Nothing to contrast with: a sentence, not an index out of range in the middle of a run."""
    with pytest.raises(DistillError):
        create_distiller("crd", {"nce_k": 4}, s_dim=3, t_dim=3, labels=[5] * 8)
LARGE = {"equal": [c for c in range(10) for _ in range(200)], "unequal": [0] * 900 + [1] * 500 + [2] * 590 + [3] * 10}


@pytest.mark.parametrize("labels", LARGE.values(), ids=LARGE)
def test_few_of_many_negatives(labels):
    """K far below the number of negatives: these are drawn in another way, of which all the same is asked."""
    bank, n, K = memory(labels, 300, seed=6), 400, 300
    assert bank.tries < bank.n_neg_range[1] / 2
    for i in (0, 950, 1999):
        other = others(labels, i)
        idx = bank.draw(torch.full((n,), i))
        assert idx.shape == (n, 1 + K) and (idx[:, 0] == i).all()
        rows = idx[:, 1:].sort(1).values
        assert (rows.diff() > 0).all() and set(rows.flatten().tolist()) <= set(other)
        m = len(other)
        uniform(Counter(rows.flatten().tolist()), m, n * K / m, (m - K) / (m - 1))
        # how many come from the first third: hypergeometric, so narrower than draws with replacement
        law = stats.hypergeom(m, m // 3, K)
        hits = (rows < other[m // 3]).sum(1).double()
        assert abs(float(hits.mean()) - law.mean()) < 5 * law.std() / n**0.5
        assert abs(float(hits.var()) / law.var() - 1) < 5 * (2 / n) ** 0.5


def test_tries_suffice():
    """Against simulated draws: their mean, and their most by far."""
    rng = np.random.default_rng(0)
    for n, k in ((1000, 1), (1000, 300), (4000, 1800)):
        needed = []
        for _ in range(300):
            _, first = np.unique(rng.integers(n, size=6 * n), return_index=True)
            needed.append(np.sort(first)[k - 1] + 1)
        assert np.mean(needed) + 8 * np.std(needed) < draws_for(k, n) < np.mean(needed) + 16 * np.std(needed) + 110


