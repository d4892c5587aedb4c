"""Real text in LiteLLM's envelope, and the topic that holds it.

The text is AlpacaEval's instructions with GPT-4's answers (Apache-2.0, fetched by tools/fetch-models.sh), each answer cut
at paragraphs. Every value differs in ids and times. A text comes again after about a megabyte of other texts, farther
than what the compression of a table or a batch looks back within one page.

    topic.py TEXTS ROWS    prints the records, one a line
"""

import json
import random
import re
import sys

PARAGRAPH = 220


def texts(path):
    """Returns (instruction, part of the answer) in a fixed order."""
    with open(path) as file:
        items = json.load(file)
    pairs = []
    for item in items:
        part = ""
        for piece in re.split(r"(?<=\n)\n+|(?<=[.!?]) +", item["output"]):
            if part and len(part) + len(piece) > PARAGRAPH:
                pairs.append((item["instruction"], part))
                part = ""
            part += piece + " "
        pairs.append((item["instruction"], part.strip()))
    random.Random(7).shuffle(pairs)
    return [pair for pair in pairs if len(pair[0]) < 600 and len(pair[1]) > 40]


def value(pairs, i):
    """Returns the bytes of record `i`."""
    prompt, answer = pairs[i % len(pairs)]
    rng = random.Random(i)
    name, start = f"chatcmpl-{rng.getrandbits(96):024x}", 1_772_366_400 + i * 0.013
    tokens = (len(prompt) // 4 + 12, len(answer) // 4)
    group = f"support-{i % 7}"
    payload = {
        "id": name,
        "trace_id": f"{rng.getrandbits(128):032x}",
        "call_type": "acompletion",
        "stream": False,
        "response_cost": 0.0,
        "status": "success",
        "custom_llm_provider": "hosted_vllm",
        "total_tokens": sum(tokens),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "startTime": round(start, 6),
        "endTime": round(start + tokens[1] * 0.011, 6),
        "completionStartTime": round(start + 0.21, 6),
        "response_time": 0.21,
        "model_map_information": {"model_map_key": group, "model_map_value": None},
        "model": "hosted_vllm/support-v4",
        "model_id": "d41d8cd98f00b204",
        "model_group": group,
        "api_base": "http://vllm:8000/v1",
        "metadata": {
            "user_api_key_hash": "88dc28d0f030c55ed4ab77ed8faf098196cb1c05",
            "user_api_key_alias": "prod",
            "user_api_key_team_id": f"team-{i % 11}",
            "requester_metadata": {"session_id": f"s-{i // 3}"},
        },
        "cache_hit": None,
        "saved_cache_cost": 0.0,
        "request_tags": ["User-Agent: openai", "workload:returns"],
        "end_user": f"customer-{i % 5003}",
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": prompt}],
        "response": {
            "id": name,
            "created": int(start),
            "model": "support-v4",
            "object": "chat.completion",
            "choices": [
                {"finish_reason": "stop", "index": 0, "message": {"content": answer, "role": "assistant"}}
            ],
            "usage": {"completion_tokens": tokens[1], "prompt_tokens": tokens[0], "total_tokens": sum(tokens)},
        },
        "error_str": None,
        "model_parameters": {"temperature": 0.7, "max_tokens": 512},
    }
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


def fill(brokers, topic, rows, partitions, codec, source):
    """Writes the topic where it does not hold `rows` records yet; returns the bytes of its values."""
    from confluent_kafka import Consumer, Producer, TopicPartition
    from confluent_kafka.admin import AdminClient, NewTopic

    pairs, held = texts(source), 0
    probe = Consumer({"bootstrap.servers": brokers, "group.id": "probe"})
    if topic in probe.list_topics(timeout=30).topics:
        held = sum(probe.get_watermark_offsets(TopicPartition(topic, p), timeout=30)[1] for p in range(partitions))
    else:
        admin = AdminClient({"bootstrap.servers": brokers})
        admin.create_topics([NewTopic(topic, partitions, 1, config={"retention.ms": "-1"})])[topic].result(30)
    probe.close()
    size = 0
    producer = Producer(
        {
            "bootstrap.servers": brokers,
            "compression.type": codec,
            "linger.ms": 50,
            "batch.size": 262144,
            "queue.buffering.max.messages": 200000,
        }
    )
    if held not in (0, rows):
        raise SystemExit(f"topic {topic} holds {held} records, not {rows}: remove the broker's folder")
    for i in range(rows):
        data = value(pairs, i)
        size += len(data)
        if held:
            continue
        while True:
            try:
                producer.produce(topic, data, partition=i % partitions, timestamp=1_772_366_400_000 + i)
                break
            except BufferError:
                producer.poll(0.1)
        if i % 1000 == 0:
            producer.poll(0)
    producer.flush()
    return size


if __name__ == "__main__":
    PAIRS = texts(sys.argv[1])
    for I in range(int(sys.argv[2])):
        sys.stdout.buffer.write(value(PAIRS, I) + b"\n")
