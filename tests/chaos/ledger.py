"""What was produced: each record that the broker acknowledged, and what must become of it.

Nothing here comes from taod. A record is made of texts drawn by the seed; its entry says by SHA-256 which rows and dead
letters it must end as, so that the bytes in the tables can be held against it.
"""

import gzip
import hashlib
import json

from confluent_kafka import Producer

from parts import QUIET

# A log format that is readable only while the config maps it.
MAPPING = """
[[ingest.mapping]]
name = "house"
when = "/house/q"
[ingest.mapping.parts]
messages = "/house/q"
response = "/house/a"
"""


def sha(*parts):
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


class Entry:
    """One acknowledged record: the rows and dead letters it must end as, by index within the record."""

    __slots__ = ("rows", "letters", "either", "payload", "key", "visible", "request")

    def __init__(self, rows=None, letters=(), either=False, payload=b"", key=None, request=None):
        self.rows = rows or {}
        self.letters = frozenset(letters)
        # True where it depends on the config of the moment whether it ends as its row or as a dead letter.
        self.either = either
        self.payload = sha(payload or b"")
        self.key = key
        # The id by which its one row can be erased.
        self.request = request
        # False once its transaction was aborted.
        self.visible = True


class Ledger:
    """All acknowledged records of one topic, by (partition, offset)."""

    def __init__(self):
        self.entries = {}
        self.newest = {}

    def add(self, partition, offset, entry):
        self.entries[partition, offset] = entry
        if entry.key is not None:
            place = (partition, entry.key)
            self.newest[place] = max(offset, self.newest.get(place, -1))

    def is_superseded(self, partition, offset, entry):
        """A compacted topic may have dropped a record once a later one has its key."""
        return entry.key is not None and self.newest[partition, entry.key] > offset


class Maker:
    """Draws records: several log formats, several calls a record, and what cannot be read."""

    WORDS = ["lorem", "ipsum\n", '"dolor"', "sit\\", "ämet", "消息", "tab\t", "plain", "🦀", "\u0007"]

    def __init__(self, rng):
        self.rng = rng
        self.sequence = 0

    def text(self, words):
        return " ".join(self.rng.choices(self.WORDS, k=words))

    def texts(self):
        self.sequence += 1
        prompt = f"row {self.sequence} {self.text(self.rng.randint(1, 60))}"
        return prompt, f"answer {self.sequence} {self.text(self.rng.randint(1, 80))}"

    def request_id(self):
        return f"request-{self.sequence}-of-many"

    def pair(self, prompt, answer):
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": prompt}]
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        kind = self.rng.randrange(3)
        if kind == 0:
            return {"id": self.request_id(), "call_type": "acompletion", "status": "success", "model": "m",
                    "startTime": 1.7e9, "endTime": 1.7e9 + 1, "messages": messages, "response": {"choices": [choice]},
                    "metadata": {}, "model_parameters": {"temperature": 1}}
        response = {"id": "r", "object": "chat.completion", "model": "m", "choices": [choice]}
        if kind == 1:
            cut = len(answer) // 2
            deltas = [{"role": "assistant", "content": answer[:cut]}, {"content": answer[cut:]}]
            chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
            chunks[1]["choices"][0]["finish_reason"] = "stop"
            response = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        return {"timestamp": "2026-05-01T12:00:00.25Z", "request": {"model": "m", "messages": messages},
                "response": response, "status": 200}

    def call(self):
        prompt, answer = self.texts()
        return self.pair(prompt, answer), sha(prompt, answer)

    def record(self):
        """Returns the payload of a record and its entry."""
        kind = self.rng.random()
        if kind < 0.62:
            body, digest = self.call()
            payload, rows, letters = json.dumps(body).encode(), {0: digest}, ()
            if self.rng.random() < 0.15:
                payload = gzip.compress(payload)
        elif kind < 0.75:
            payload, rows, letters = self.several()
        elif kind < 0.87:
            payload, rows, letters = self.poison(), {}, (0,)
        elif kind < 0.93:
            prompt, answer = self.texts()
            payload = json.dumps({"house": {"q": prompt, "a": answer}}).encode()
            return payload, Entry({0: sha(prompt, answer)}, (0,), either=True, payload=payload)
        else:
            payload, rows, letters = self.rng.choice([None, b"", b" \n", b"[]"]), {}, ()
        request = self.request_id() if kind < 0.62 and "call_type" in body else None
        return payload, Entry(rows, letters, payload=payload, request=request)

    def several(self):
        """One record with several calls, some of which may not be readable."""
        items, rows, letters = [], {}, []
        for index in range(self.rng.randint(2, 5)):
            # The first is a call: a list without an object is one value, not several.
            if index > 0 and self.rng.random() < 0.25:
                items.append(self.rng.choice([7, {"a": 1}]))
                letters.append(index)
            else:
                body, rows[index] = self.call()
                items.append(body)
        return json.dumps(items).encode(), rows, letters

    def poison(self):
        body, _ = self.call()
        whole = json.dumps(body).encode()
        return self.rng.choice([
            whole[: len(whole) // 2],
            b"no json at all " + self.text(5).encode(),
            b'{"a": "\xff\xfe"}',
            b"[" * 300,
            b'{"some": "object", "n": %d}' % self.sequence,
            b"\x1f\x8b" + bytes(self.rng.randrange(256) for _ in range(40)),
        ])


class Log:
    """A topic's producers. A record counts as produced once the broker has acknowledged it."""

    def __init__(self, brokers, topic, partitions, rng, compacted=False):
        self.brokers, self.topic, self.partitions = brokers, topic, partitions
        self.rng, self.compacted = rng, compacted
        self.ledger, self.maker = Ledger(), Maker(rng)
        self.produced = 0
        config = {**QUIET, "bootstrap.servers": brokers, "linger.ms": 5, "message.timeout.ms": 120_000,
                  "topic.metadata.refresh.interval.ms": 1000}
        self.plain = Producer({**config, "enable.idempotence": True, "compression.type": "zstd"})
        self.transactional = None
        self.config = config

    def send(self, count, producer=None, into=None):
        """Hands `count` records to the producer."""
        producer = producer or self.plain
        for _ in range(count):
            payload, entry = self.maker.record()
            key = None
            if self.compacted:
                key = b"k%d" % self.rng.randrange(40) if self.rng.random() < 0.7 else b"u%d" % self.maker.sequence
                entry.key = key
            producer.produce(self.topic, value=payload, key=key, partition=self.rng.randrange(self.partitions),
                             on_delivery=self.delivered(entry, into))
            producer.poll(0)

    def delivered(self, entry, into):
        def on_delivery(error, message):
            if error is not None:
                raise RuntimeError(f"the producer gave up: {error}")
            self.ledger.add(message.partition(), message.offset(), entry)
            self.produced += 1
            if into is not None:
                into.append(entry)
        return on_delivery

    def flush(self):
        """Waits until everything handed over is acknowledged."""
        if self.plain.flush(120) > 0:
            raise RuntimeError("the broker did not acknowledge everything within 120 s")

    def transaction(self, count, commit):
        """Produces one transaction and ends it."""
        if self.transactional is None:
            self.transactional = Producer({**self.config, "transactional.id": self.topic, "message.timeout.ms": 60_000})
            self.transactional.init_transactions(60)
        inside = []
        self.transactional.begin_transaction()
        self.send(count, self.transactional, inside)
        self.transactional.flush(60)
        if commit:
            self.transactional.commit_transaction(60)
        else:
            self.transactional.abort_transaction(60)
            for entry in inside:
                entry.visible = False
        # What the abort purged before it was sent was not acknowledged and is no part of the log.
        return len(inside)
