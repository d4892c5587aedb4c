"""llama.cpp's own server, as one starts it beside taod: every adapter of a folder, none of them applied.

    python tests/tools/llama_cpp_server.py MODEL.gguf FOLDER PORT [all|ram]

Prints "ready" and serves until it is killed. It remembers no prompts, as it should beside taod; with "ram" it does where a
request asks for that, and with "all" always, as llama.cpp does by default.
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
# Its threads wait for each other by spinning, which beside other tests costs more than a second one brings.
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# Prompts are remembered without regard to the scales of adapters: after a change, answers would go on from the former one's.
memory = sys.argv[4] if len(sys.argv) > 4 else "none"
params.cache_prompt = memory == "all"
params.cache_ram_mib = 0 if memory == "none" else 512
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
