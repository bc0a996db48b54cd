"""Exact nearest neighbours beside faiss and scikit-learn, and the linear probe beside scikit-learn's.

    .venv/bin/python benchmarks/knn.py [rounds] [share]

It writes benchmarks/knn.md; share < 1 makes all smaller, to try it, and writes nothing.

Random queries search random vectors for 10 neighbours by cosine similarity, in two sizes. The variants take turns in
every round; the first warms up and is not counted; ratios are taken within a round. All must find the same neighbours:
where two differ, their similarities must be equal to float32's rounding. faiss is no dependency: where it can be
imported it takes part, as after `pip install --target /tmp/faiss --no-deps faiss-cpu` with PYTHONPATH=/tmp/faiss. The
aim: at most 1.25 times as long as faiss's flat index.

The probes are logistic regressions with four strengths on 45,000 × 768 correlated features of ten classes that overlap,
each fit from where the last ended, once a round; the objectives reached are compared as well.
"""
import sys
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from dinocls.kit import files, machine
from dinocls.probe import STRENGTHS, logistic, neighbours

K, DIM, CLASSES = 10, 768, 10
SIZES = ((10_000, 50_000, 768), (1_000, 45_000, 384))  # queries, vectors, numbers in each


def unit(x: np.ndarray) -> np.ndarray: return x / np.linalg.norm(x, axis=1, keepdims=True)


def features(n: int, rng, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Make standardised float32 features whose axes have variances 1, 1/2, 1/3, …, around the means of ten classes, and
    labels."""
    scale = np.arange(1, DIM + 1) ** -0.5
    turn, labels = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0], rng.integers(0, CLASSES, n)
    x = ((rng.normal(size=(CLASSES, DIM)) * spread * 5)[labels] * scale ** 2 + rng.normal(size=(n, DIM)) * scale) @ turn
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), labels


def searches(bank: np.ndarray, queries: np.ndarray) -> dict:  # name → function or None
    "Return the variants, each from raw vectors to neighbours: normalising the bank and building the index are in its time."
    variants = {'dinocls': lambda: tuple(part.numpy() for part in neighbours(bank, queries, K))}
    try:
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        def flat():
            index = faiss.IndexFlatIP(bank.shape[1])
            index.add(unit(bank))
            return index.search(unit(queries), K)
        variants['faiss, IndexFlatIP'] = flat
    except ImportError: variants['faiss, IndexFlatIP'] = None
    from sklearn.neighbors import NearestNeighbors
    def brute():
        distance, index = NearestNeighbors(n_neighbors=K, metric='cosine', algorithm='brute').fit(bank).kneighbors(queries)
        return 1 - distance, index
    variants['scikit-learn, NearestNeighbors'] = brute
    return variants


def same(bank, queries, index, other) -> float:
    "Return the share of equal neighbours; assert that the others are as near, to rounding."
    bank, queries = unit(bank), unit(queries)
    def similar(i, rows): return np.einsum('md,mkd->mk', queries[rows], bank[i])
    rows = np.flatnonzero((index != other).any(1))
    assert np.abs(similar(index[rows], rows) - similar(other[rows], rows)).max(initial=0) < 1e-5
    return float((index == other).mean())


def turns(variants: dict, rounds: int) -> tuple[dict,
                                                dict]:  # name → seconds of each counted round; name → the last result
    "Let the variants take turns; nobody always comes first."
    times, results, ready = {name: [] for name in variants}, {}, list(variants)
    for number in range(rounds + 1):
        for name in ready[number % len(ready):] + ready[:number % len(ready)]:
            clock = time.perf_counter()
            results[name] = variants[name]()
            times[name].append(time.perf_counter() - clock)
            print(f'round {number}: {name} {times[name][-1]:.2f} s', flush=True)
    return {name: t[1:] for name, t in times.items()}, results


def against(ours: list, theirs: list) -> str:
    "Return how many times as long ours takes: the median over rounds and the range."
    ratios = [a / b for a, b in zip(ours, theirs)]
    return f'{median(ratios):.2f}× ({min(ratios):.2f} – {max(ratios):.2f})'


def objective(x: np.ndarray, labels: np.ndarray, weights: np.ndarray, C: float) -> float:
    "Return what is minimised, in double precision: C · Σ cross-entropy + ½ ‖weights‖², the intercepts free."
    logits = torch.from_numpy(x).double() @ torch.from_numpy(weights[:, :-1]).double().T + torch.from_numpy(weights[:,
        -1]).double()
    return float(C * F.cross_entropy(logits, torch.from_numpy(labels),
                                     reduction='sum') + (weights[:, :-1] ** 2).sum() / 2)


def ours(x, labels) -> list[np.ndarray]:
    "Fit all strengths as the chapter does."
    return [weights.numpy() for _, weights, _ in logistic(torch.from_numpy(x).double(), torch.from_numpy(labels),
                                                          sorted(STRENGTHS))]


def theirs(x, labels) -> list[np.ndarray]:
    "Fit all strengths by scikit-learn, at the tolerance that the book used before."
    from sklearn.linear_model import LogisticRegression
    model, out = LogisticRegression(max_iter=500, warm_start=True, tol=1e-5), []
    for C in sorted(STRENGTHS):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model.set_params(C=C).fit(x, labels)
        out.append(np.c_[model.coef_, model.intercept_])
    return out


def search_table(m: int, n: int, dim: int, rounds: int, rng) -> list[str]:
    "Let the searches of one size take turns; return a table of Markdown."
    bank, queries = (rng.standard_normal((size, dim), dtype=np.float32) for size in (n, m))
    variants = searches(bank, queries)
    times, found = turns({name: f for name, f in variants.items() if f}, rounds)
    lines = [f'{m:,} queries, {n:,} × {dim} vectors:', '',
             '| search | seconds, median | dinocls takes, of its time (range over rounds) | same neighbours |',
             '|---|---|---|---|']
    for name in variants:
        if name not in times: lines.append(f'| {name} | not installed | | |')
        else:
            equal = 100 * same(bank, queries, found['dinocls'][1], found[name][1])
            lines.append(f'| {name} | {median(times[name]):.2f} | {against(times["dinocls"], times[name])} | '
                         f'{equal:.3f} % |')
    return [*lines, '']


def probe_tables(rows: int, rounds: int, rng) -> list[str]:
    "Let the linear probes take turns; return two tables of Markdown."
    x, labels = features(rows, rng)
    fits, weights = turns({'dinocls, L-BFGS along the principal axes': lambda: ours(x, labels),
                           'scikit-learn, LogisticRegression': lambda: theirs(x, labels)}, rounds)
    mine, _ = fits.values()
    reached = {C: [objective(x, labels, w[i], C) for w in weights.values()] for i, C in enumerate(sorted(STRENGTHS))}
    def guess(w): return (x @ w[:, :-1].T + w[:, -1]).argmax(1)
    differ = [int((guess(a) != guess(b)).sum()) for a, b in zip(*weights.values())]
    return [f'Logistic regression on {rows:,} × {DIM} standardised features, C = '
            f'{", ".join(f"{C:g}" for C in reached)}:', '',
            '| probe | seconds, median | dinocls takes, of its time (range over rounds) |', '|---|---|---|',
            *(f'| {name} | {median(t):.2f} | {against(mine, t)} |' for name, t in fits.items()), '',
            '| C | objective, dinocls | objective, scikit-learn | relative difference | predictions that differ |',
            '|---|---|---|---|---|',
            *(f'| {C:g} | {a:.6g} | {b:.6g} | {a / b - 1:+.1e} | {d} of {rows:,} |'
              for (C, (a, b)), d in zip(reached.items(), differ))]


def main(rounds: int, share: float):
    threads, rng = machine.cores(), np.random.default_rng(0)
    torch.set_num_threads(threads)
    tables = [line for m, n, dim in SIZES
              for line in search_table(round(share * m), round(share * n), dim, rounds, rng)]
    tables += probe_tables(round(share * 45_000), max(1, rounds // 3), rng)
    h, v = machine.hardware(), {name: __import__(name).__version__ for name in ('torch', 'numpy', 'sklearn')}
    if 'faiss' in sys.modules: v['faiss'] = sys.modules['faiss'].__version__
    text = ['# Nearest neighbours and the linear probe', '',
            f'{h["cpu"]}, {threads} threads, {h["memory_gb"]} GB; '
            f'{", ".join(f"{k} {number}" for k, number in v.items())}; '
            f'{rounds} rounds.', '',
            f'{K} neighbours by cosine similarity. Where neighbours are not the same, their similarities are, to '
            f'rounding. '
            'Each goes from raw vectors to neighbours, normalising and index included. The aim: at most 1.25× of faiss.', '',
            *tables]
    print('\n'.join(text))
    if share == 1:
        with files.replacing(Path(__file__).with_suffix('.md')) as out:
            out.write_text('\n'.join(text) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, float(sys.argv[2]) if len(sys.argv) > 2 else 1)
