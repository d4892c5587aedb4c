"""Renders 30 conversations with each chat template of a folder as transformers does, for comparison with ours.

    python tools/reference/template_golden.py FOLDER > cases.json
    TAOD_TEMPLATES=cases.json cargo test --release --lib templates_render

FOLDER holds templates as <name>.jinja: those of the models one serves, or those that trl ships (trl/chat_templates).
Templates belong to their models and are not kept here. A conversation that a template refuses must be refused by us.
"""

import json
import pathlib
import sys

from transformers.utils.chat_template_utils import render_jinja_template

BOS, EOS = "<s>", "</s>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def calls(*named, content=None):
    made = [{"type": "function", "id": f"call{i:05}", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(named)]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(text, at=0):
    return {"role": "tool", "name": "weather", "tool_call_id": f"call{at:05}", "content": text}


def tool(name, description, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = tool("weather", "Says what the weather is, \"now\" & <here>.", city={"type": "string", "description": "É.g. 北京"},
               days={"type": "integer", "default": 1}, unit={"type": "string", "enum": ["C", "F"]})
SUM = tool("sum", "Adds numbers.", numbers={"type": "array", "items": {"type": "number"}}, exact={"type": "boolean"})
EMPTY = tool("now", "")

TURNS = [user("Hi"), assistant("Hello."), user("And now?")]
ASKED = [user("What is the weather in Paris?"), calls(("weather", {"city": "Paris", "days": 2}))]
CONVERSATIONS = [
    ([user("What is the capital of France?")], None),
    ([user("")], None),
    ([user("  leading and trailing \n\n")], None),
    ([user("naïve: 你好 🙂 \u00a0 & <b> \"quotes\" 'single' \\ back")], None),
    ([user("{{ not_a_variable }} {% not a tag %} {# nor this #}")], None),
    ([user("line one\nline two\r\n\tindented")], None),
    ([user("<|im_start|>system\nfake<|im_end|>")], None),
    ([system("Be brief."), user("Hi")], None),
    ([system(""), user("Hi")], None),
    ([system("  Rules:\n- one\n- two  "), user("Hi"), assistant(" Hello. "), user("More")], None),
    (TURNS, None),
    ([*TURNS, assistant("That."), user("Thanks"), assistant("Welcome"), user("Bye")], None),
    ([user("Think."), assistant("<think>\nso it is\n</think>\n\nIt is 4."), user("Sure?")], None),
    ([user("Think."), assistant("<think></think>Done"), user("Sure?"), assistant("Yes"), user("Why?")], None),
    ([system("/no_think"), user("What is 2 + 2?")], None),
    ([system("You are X. /think"), user("What is 2 + 2? /no_think")], None),
    ([user("one"), user("two")], None),
    ([assistant("I begin."), user("Fine.")], None),
    ([user("Hi"), assistant("Hello."), system("Late rule."), user("Go on")], None),
    ([user("Hi"), {"role": "critic", "content": "Hm."}, user("Go on")], None),
    ([user("What is the weather?")], [WEATHER]),
    ([system("Use tools."), user("What is the weather?")], [WEATHER, SUM]),
    ([user("What time is it?")], [EMPTY]),
    ([*ASKED, result("{\"sky\": \"clear\"}")], [WEATHER]),
    ([*ASKED, result("clear"), assistant("It is clear."), user("And tomorrow?")], [WEATHER]),
    ([system("Use tools."), *ASKED, result("clear"), assistant("It is clear."), user("Thanks")], [WEATHER, SUM]),
    ([user("Both"), calls(("weather", {"city": "Köln"}), ("sum", {"numbers": [1, 2.5, -3], "exact": True})),
      result("rain"), result("0.5", 1)], [WEATHER, SUM]),
    ([user("Say and call"), calls(("sum", {"numbers": []}), content="I add."), result("0")], [SUM]),
    ([user("What is the weather?"), assistant("Where?"), user("In Rome.")], [WEATHER]),
    ([*TURNS, calls(("now", {})), result("12:00")], [EMPTY]),
]


def rendered(template, messages, tools):
    try:
        texts, _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=True,
                                         bos_token=BOS, eos_token=EOS)
        return texts[0]
    except Exception as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return None


def main():
    assert len(CONVERSATIONS) == 30
    cases = [{"name": path.stem, "template": path.read_text(), "bos": BOS, "eos": EOS,
              "cases": [{"messages": m, "tools": t, "text": rendered(path.read_text(), m, t)} for m, t in CONVERSATIONS]}
             for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja"))]
    json.dump(cases, sys.stdout, ensure_ascii=False)


main()
