"""Length bias of scores, for tests/golden/length_bias.json.

By numpy's least squares on the design matrix with one dummy for each prompt (no deviations from means), and the standard
error by clusters of prompts from the sandwich of the whole design.

    python tools/reference/length_golden.py
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "length_bias.json"


def case(seed, prompts, slope, noise, scale):
    rng = np.random.default_rng(seed)
    points = []
    for prompt in range(prompts):
        effect, typical = rng.normal() * scale, rng.uniform(2, 5)
        for _ in range(rng.integers(1, 7)):
            words = int(np.exp(typical + 0.5 * rng.normal()))
            points.append((prompt, words, effect + slope * np.log1p(words) + noise * rng.normal() + 0.3 * typical))
    group = np.array([p for p, _, _ in points])
    x = np.log1p(np.array([w for _, w, _ in points], dtype=float))
    s = np.array([r for _, _, r in points])
    design = np.column_stack([x] + [(group == g).astype(float) for g in range(prompts)])
    beta, *_ = np.linalg.lstsq(design, s, rcond=None)
    bread = np.linalg.inv(design.T @ design)
    residual = s - design @ beta
    meat = sum(np.outer(v, v) for v in (design[group == g].T @ residual[group == g] for g in range(prompts)))
    error = float(np.sqrt((bread @ meat @ bread)[0, 0]))
    centre = float(x.mean())
    return {"points": points, "slope": float(beta[0]), "error": error, "centre": centre,
            "corrected": (s - beta[0] * (x - centre)).tolist()}


cases = [case(1, 30, 0.8, 0.5, 1.0), case(2, 60, -0.1, 0.05, 0.2), case(3, 40, 12.0, 30.0, 100.0)]
GOLDEN.write_text(json.dumps(cases) + "\n")
