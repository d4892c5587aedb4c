"""mistral.rs behind the routes of its own server, which its Python package does not contain.

    python tests/tools/mistralrs_server.py MODEL_DIR

Prints `ready` and the port. Routes, fields, statuses and codes are those of mistralrs-server-core 0.9; the engine is the real one.
"""

import json
import pathlib
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from mistralrs import Architecture, ChatCompletionRequest, LoraAdapterError, ModelDType, Runner, Which

runner = Runner(which=Which.Lora(model_id=sys.argv[1], arch=Architecture.Llama, dtype=ModelDType.F32), no_paged_attn=True)
STATUS = {"lora_adapter_already_loaded": 409, "lora_generation_mismatch": 409, "lora_adapter_not_found": 404}


def told(info):
    return {"id": info.alias, "object": "lora_adapter", "source": info.source, "generation": info.generation}


def chat(body):
    aliases = [info.alias for info in runner.lora_adapter_status().adapters]
    adapter = body["model"] if body["model"] in aliases else None
    if adapter is None and body["model"] != "default":
        return 404, {"error": {"message": f"model `{body['model']}` was not found"}}
    request = ChatCompletionRequest(
        messages=body["messages"], model="default", temperature=body["temperature"], max_tokens=body["max_tokens"],
        logprobs=True, adapter=adapter,
    )
    choice = runner.send_chat_completion_request(request).choices[0]
    content = [{"token": p.token, "logprob": p.logprob} for p in choice.logprobs.content]
    message = {"role": "assistant", "content": choice.message.content}
    return 200, {"choices": [{"message": message, "finish_reason": choice.finish_reason, "logprobs": {"content": content}}]}


def load(body):
    path = str(pathlib.Path(body["lora_path"]).resolve())
    info = runner.load_lora_adapter(
        body["lora_name"], path, load_inplace=body.get("load_inplace", False),
        expected_generation=body.get("expected_generation"),
    )
    return 200, told(info)


def unload(body):
    return 200, told(runner.unload_lora_adapter(body["lora_name"], expected_generation=body.get("expected_generation")))


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        assert self.path == "/v1/lora_adapters"
        self.answer(200, {"object": "list", "data": [told(info) for info in runner.lora_adapter_status().adapters]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        routes = {"/v1/chat/completions": chat, "/v1/load_lora_adapter": load, "/v1/unload_lora_adapter": unload}
        try:
            self.answer(*routes[self.path](body))
        except LoraAdapterError as error:
            body = {"error": {"message": str(error), "type": "invalid_request_error", "code": error.code}}
            self.answer(STATUS.get(error.code, 500), body)

    def log_message(self, *arguments):
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
print("ready", server.server_port, flush=True)
server.serve_forever()
