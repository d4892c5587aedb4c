"""Makes tests/golden/lora_patterns.json: which value PEFT takes for a module under a rank_pattern or alpha_pattern.

    python tools/reference/lora_patterns_golden.py

Made with peft 0.21.
"""

import json
import pathlib

from peft.utils.other import get_pattern_key

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "lora_patterns.json"
PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj",
         "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_up_proj"]
PATTERNS = [
    {"q_proj": 4}, {"up_proj": 4}, {"proj": 4}, {"self_attn.q_proj": 4}, {"layers.1.self_attn.q_proj": 4},
    {"1.self_attn.q_proj": 4}, {"model.layers.1.mlp.up_proj": 4}, {"^model.layers.1.mlp.up_proj": 4},
    {"^layers.1.mlp.up_proj": 4}, {"q_proj": 4, "layers.1.self_attn.q_proj": 8},
    {"layers.1.self_attn.q_proj": 8, "q_proj": 4}, {r"layers\.(0|1)\.self_attn\.q_proj": 4, ".*_proj": 2},
    {"q_proj|up_proj": 4}, {r"model.layers.\d+.mlp.*": 4}, {"self_attn": 4}, {"": 4},
]
cases = []
for pattern in PATTERNS:
    for path in PATHS:
        cases.append(dict(pattern=pattern, path=path, value=pattern.get(get_pattern_key(list(pattern), path))))
GOLDEN.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
print(GOLDEN, len(cases), "cases")
