"""Platt's calibration and expected calibration errors, for tests/golden/platt.json.

Fitted by gradient descent in plain Python until the gradient vanishes (a method that has
nothing in common with Newton's), on made-up scores of several scales.

    python tools/reference/platt_golden.py
"""

import json
import math
import random
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "platt.json"
BINS = 10


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def fit(raw, good):
    plus = sum(good)
    minus = len(good) - plus
    targets = [(plus + 1) / (plus + 2) if g else 1 / (minus + 2) for g in good]
    mean = sum(raw) / len(raw)
    spread = math.sqrt(sum((x - mean) ** 2 for x in raw) / len(raw))
    xs = [(x - mean) / spread for x in raw]
    a = b = 0.0
    # The curvature of each parameter is at most sum(x^2) / 4 = n / 4 and n / 4, and they mix at most fully.
    rate = 2 / len(raw)
    for _ in range(200_000):
        ga = gb = 0.0
        for x, t in zip(xs, targets):
            slope = logistic(a * x + b) - t
            ga += slope * x
            gb += slope
        a -= rate * ga
        b -= rate * gb
        if abs(ga) + abs(gb) < 1e-12:
            break
    return a / spread, b - a * mean / spread


def calibration_error(chances, good):
    bins = [[] for _ in range(BINS)]
    for p, g in zip(chances, good):
        bins[min(int(p * BINS), BINS - 1)].append((p, g))
    return sum(abs(sum(p for p, _ in b) - sum(g for _, g in b)) for b in bins) / len(good)


def case(seed, n, scale, shift, truth):
    rng = random.Random(seed)
    raw = [rng.gauss(0, 1) * scale + shift for _ in range(n)]
    good = [rng.random() < logistic(truth[0] * (x - shift) / scale + truth[1]) for x in raw]
    slope, offset = fit(raw, good)
    apply = lambda curve, xs: [logistic(curve[0] * x + curve[1]) for x in xs]
    halves = [(raw[k::2], good[k::2]) for k in (0, 1)]
    unseen = [p for k in (0, 1) for p in apply(fit(*halves[k]), halves[1 - k][0])]
    labels = halves[1][1] + halves[0][1]
    return {"raw": raw, "good": good, "slope": slope, "offset": offset,
            "error": calibration_error(apply((slope, offset), raw), good),
            "held_out_error": calibration_error(unseen, labels)}


cases = [case(1, 60, 1.0, 0.0, (2.0, 0.0)), case(2, 200, 12.0, -40.0, (1.0, -0.7)), case(3, 300, 0.02, 0.5, (4.0, 1.0))]
GOLDEN.write_text(json.dumps(cases) + "\n")
