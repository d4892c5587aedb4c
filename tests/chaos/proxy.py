"""An HTTP proxy in front of the S3 server that misbehaves as told.

It hands every request on with the `Host` it came with, which the signature covers. A rule names the requests it is for
and what happens to them; the first that fits and is not used up wins.
"""

import http.client
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What can happen to a request. `land` says whether the server still sees it.
KINDS = {
    "503": dict(land=False, status=503, code="SlowDown"),
    "500": dict(land=False, status=500, code="InternalError"),
    "409": dict(land=False, status=409, code="ConditionalRequestConflict"),
    "landed_500": dict(land=True, status=500, code="InternalError"),
    "landed_503": dict(land=True, status=503, code="SlowDown"),
    "drop": dict(land=False, status=None, code=None),
    "landed_drop": dict(land=True, status=None, code=None),
    "hang": dict(land=False, status=None, code="hang"),
    "landed_hang": dict(land=True, status=None, code="hang"),
    "slow": dict(land=True, status=0, code=None),
}


class Rule:
    """Lets `kind` happen to the next `times` requests of `method` whose path holds `part`."""

    def __init__(self, kind, method="PUT", part="", times=1, seconds=3.0):
        self.kind, self.method, self.part, self.times, self.seconds = kind, method, part, times, seconds
        self.used = 0

    def fits(self, method, path):
        return self.used < self.times and self.method in ("*", method) and self.part in path


class Proxy:
    def __init__(self, target_port):
        self.target_port = target_port
        self.rules, self.lock = [], threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def set(self, rules):
        with self.lock:
            self.rules = list(rules)

    def clear(self):
        """Ends all faults; returns how many requests they met."""
        with self.lock:
            used = sum(rule.used for rule in self.rules)
            self.rules = []
        return used

    def rule_for(self, method, path):
        with self.lock:
            for rule in self.rules:
                if rule.fits(method, path):
                    rule.used += 1
                    return rule
        return None

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handler(proxy):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.upstream = None

            def finish(self):
                if self.upstream:
                    self.upstream.close()
                super().finish()

            def log_message(self, *_):
                pass

            def serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                rule = proxy.rule_for(self.command, self.path)
                fault = KINDS[rule.kind] if rule else None
                if fault is None:
                    return self.reply(*self.ask(body))
                if rule.kind == "slow":
                    time.sleep(rule.seconds)
                answer = self.ask(body) if fault["land"] else None
                if fault["code"] == "hang":
                    time.sleep(rule.seconds)
                if fault["status"] is None:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if rule.kind == "slow":
                    return self.reply(*answer)
                text = f"<Error><Code>{fault['code']}</Code><Message>on purpose</Message></Error>".encode()
                return self.reply(fault["status"], [("Content-Type", "application/xml")], text)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

            def ask(self, body):
                for attempt in range(2):
                    try:
                        if self.upstream is None:
                            self.upstream = http.client.HTTPConnection("127.0.0.1", proxy.target_port, timeout=60)
                        request = self.upstream
                        request.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                        for name, value in self.headers.items():
                            request.putheader(name, value)
                        request.endheaders(body or None)
                        answer = request.getresponse()
                        return answer.status, answer.getheaders(), answer.read()
                    except (http.client.HTTPException, OSError):
                        self.upstream = None
                        if attempt:
                            return 502, [], b"the store behind the proxy does not answer"

            def reply(self, status, headers, body):
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = len(body)
                if self.command == "HEAD":
                    length = next((value for name, value in headers if name.lower() == "content-length"), 0)
                if status not in (204, 304):
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle(self):
                try:
                    super().handle()
                except OSError:
                    # The client went away, killed perhaps.
                    pass

        return Handler
