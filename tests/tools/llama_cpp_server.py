"""llama.cpp's own server, as one starts it beside taod: every adapter of a folder, none of them applied.

    python tests/tools/llama_cpp_server.py MODEL.gguf FOLDER PORT

Prints "ready" and serves until it is killed.
"""

import json
import pathlib
import signal
import sys
import urllib.request

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[3])
params.n_ctx = 1024
params.n_parallel = 1
# Prompts are remembered without regard to the scales of adapters: after a change, answers would go on from the former one's.
params.cache_prompt = False
params.cache_ram_mib = 0
adapters = []
for file in sorted(pathlib.Path(sys.argv[2]).glob("*.gguf")):
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(file), 1.0
    adapters.append(adapter)
params.lora_adapters = adapters
server = xllamacpp.Server(params)
# What --lora-init-without-apply does; the binding has no such switch that works.
request = urllib.request.Request(
    server.listening_address + "/lora-adapters", json.dumps([]).encode(), {"content-type": "application/json"}
)
urllib.request.urlopen(request, timeout=60).read()
print("ready", flush=True)
signal.pause()
