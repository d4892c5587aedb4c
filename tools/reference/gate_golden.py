#!/usr/bin/env python3
"""Makes the gate's golden numbers a second time, from the formulas alone.

tests/golden/gate_evidence.json: the e-process in 50 digits, multiplying the wealth itself instead of adding logarithms.
tests/golden/gate_evidence_many.f64: for each of 10,000 generated sequences, ln W at its end, the highest ln W on the
way, and the sum of its stakes, as little-endian doubles. The sequences come from a generator that the test writes out too.
tests/golden/gate_order.json: seeded permutations by a ChaCha20 written out here. Needs mpmath. Run it from the root of
the repository:

    python3 tools/reference/gate_golden.py
"""

import json
import random
import struct

from mpmath import mp, mpf, log

mp.dps = 50
C = mpf(1) / 2
PRIOR = mpf("0.12")


def evidence(values, margin):
    """Returns [lambda_i, ln W_i] for i = 1, 2, ...

    mu_i = sum_{j<=i} d_j / (i+1),  v_i = (0.12 + sum_{j<=i} (d_j - mu_j)^2) / (i+1),
    lambda_i = clip((mu_{i-1} - m) / (v_{i-1} + (mu_{i-1} - m)^2), 0, c/(1+m)),  W_i = W_{i-1} (1 + lambda_i (d_i - m)).
    """
    d = [mpf(repr(x)) for x in values]
    m = mpf(repr(margin))
    prefix = [mpf(0)]
    for x in d:
        prefix.append(prefix[-1] + x)
    mu = [prefix[i] / (i + 1) for i in range(len(d) + 1)]
    wealth, out, squares = mpf(1), [], mpf(0)
    for i in range(1, len(d) + 1):
        v = (PRIOR + squares) / i
        gain = mu[i - 1] - m
        stake = min(max(gain / (v + gain**2), mpf(0)), C / (1 + m))
        wealth *= 1 + stake * (d[i - 1] - m)
        squares += (d[i - 1] - mu[i]) ** 2
        out.append([float(mp.nstr(stake, 12)), float(mp.nstr(log(wealth), 13))])
    return out


def split_mix(seed):
    """Yields 64-bit words (Steele, Lea and Flood 2014)."""
    mask = 2**64 - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


MARGINS = [0.0, 0.005, 0.02, 0.3]


def generated(index):
    """Returns the margin and the differences of a sequence: a length, a shift and a kind, then one word a difference.

    Every difference is a multiple of 2^-20, so that both sides begin with the same number.
    """
    words = split_mix(index)
    margin = MARGINS[next(words) % 4]
    length = 1 + next(words) % 90
    shift = (next(words) % 2**20 - 2**19) / 2**20
    pass_or_fail = next(words) % 2 == 0
    out = []
    for _ in range(length):
        x = (next(words) % 2**21 - 2**20) / 2**20
        x = max(-1.0, min(1.0, x / 2 + shift))
        out.append((x > 0.25) - (x < -0.25) + 0.0 if pass_or_fail else x)
    return margin, out


def many(count):
    """Returns [ln W at the end, highest ln W, sum of the stakes] of each generated sequence."""
    for index in range(count):
        margin, values = generated(index)
        d, m = [mpf(x) for x in values], mpf(repr(margin))
        wealth, highest, stakes, total, squares = mpf(1), mpf(1), mpf(0), mpf(0), mpf(0)
        for i, x in enumerate(d):
            mu, v = total / (i + 1), (PRIOR + squares) / (i + 1)
            stake = min(max((mu - m) / (v + (mu - m) ** 2), mpf(0)), C / (1 + m))
            wealth *= 1 + stake * (x - m)
            highest, stakes, total = max(highest, wealth), stakes + stake, total + x
            squares += (x - total / (i + 2)) ** 2
        yield [float(log(wealth)), float(log(highest)), float(stakes)]


def chacha20(key):
    """Yields the 64-bit words of the ChaCha20 key stream (64-bit counter, stream 0)."""
    mask = 0xFFFFFFFF
    rot = lambda x, n: ((x << n) | (x >> (32 - n))) & mask
    rounds = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    rounds += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    counter = 0
    while True:
        start = list(struct.unpack("<4I", b"expand 32-byte k")) + list(struct.unpack("<8I", key))
        start += [counter & mask, counter >> 32, 0, 0]
        w = start[:]
        for _ in range(10):
            for a, b, c, d in rounds:
                for left, right, add, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                    w[left] = (w[left] + w[right]) & mask
                    w[add] = rot(w[add] ^ w[left], shift)
        words = [(x + y) & mask for x, y in zip(w, start)]
        yield from (words[i] | words[i + 1] << 32 for i in range(0, 16, 2))
        counter += 1


def permutation(names, seed):
    """Fisher and Yates over the sorted names; a draw in the last, partial multiple of the bound is drawn again."""
    names, stream = sorted(names), chacha20(struct.pack("<Q", seed) + bytes(24))
    for last in range(len(names) - 1, 0, -1):
        bound = last + 1
        limit = (2**64 - 1) - (2**64 - 1) % bound
        draw = next(x for x in stream if x < limit)
        names[last], names[draw % bound] = names[draw % bound], names[last]
    return names


def three_valued(rng, n, better, worse):
    """Pass/fail on both sides: 1 where only the challenger passes, -1 where only the incumbent does."""
    return [rng.choices([1.0, -1.0, 0.0], [better, worse, 1 - better - worse])[0] for _ in range(n)]


def main():
    rng = random.Random(20260101)
    clip = lambda x: round(max(-1.0, min(1.0, x)), 4)
    sequences = [
        ("continuous gain", 0.005, [clip(rng.gauss(0.05, 0.35)) for _ in range(800)]),
        ("continuous null", 0.005, [clip(rng.gauss(0.0, 0.35)) for _ in range(600)]),
        ("pass or fail, large gain", 0.005, three_valued(rng, 400, 0.40, 0.05)),
        ("pass or fail, null", 0.0, three_valued(rng, 500, 0.1, 0.1)),
        ("skewed", 0.02, [clip(rng.betavariate(0.4, 2.0) * 2 - 0.4) for _ in range(700)]),
        ("a fall after a rise", 0.005, [clip(rng.gauss(0.3 if i < 200 else -0.4, 0.3)) for i in range(500)]),
        ("extremes", 0.005, [1.0] * 60 + [-1.0] * 60 + [0.0] * 30 + [1.0, -1.0] * 50),
    ]
    document = [
        {"name": name, "margin": margin, "d": d, "steps": evidence(d, margin)} for name, margin, d in sequences
    ]
    names = [f"c{i:03}" for i in range(60)]
    orders = [{"seed": seed, "order": permutation(names[:n], seed)} for seed, n in [(42, 5), (7, 60), (2**64 - 1, 33)]]
    with open("tests/golden/gate_order.json", "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(o, separators=(",", ":")) for o in orders) + "\n]\n")
    with open("tests/golden/gate_evidence.json", "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(s, separators=(",", ":")) for s in document) + "\n]\n")
    with open("tests/golden/gate_evidence_many.f64", "wb") as out:
        for numbers in many(10_000):
            out.write(struct.pack("<3d", *numbers))


if __name__ == "__main__":
    main()
