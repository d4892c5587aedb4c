"""Writes tests/golden/ifeval.json: what the published IFEval checker says of answers made here.

Usage: python tools/reference/ifeval_golden.py NLTK_DATA [OUT]

Needs if-verifiable, nltk and langdetect; NLTK_DATA holds tokenizers/punkt_tab (the wheel of llama-index-core carries one).
The answers are put together from the words and forms below with a fixed seed, so nobody's texts are copied; each is checked
under several instructions, whose arguments are set near what the answer has, so that verdicts go both ways.
"""

import json
import random
import re
import sys
import types
from pathlib import Path

import langdetect
import nltk

SEED = 20261127
SUBJECTS = ["The river", "My neighbour", "Dr. Ames", "A careful cook", "Mrs. Lind", "The old clock", "Nobody", "Our team at Hale Co.",
            "She", "The U.S. office", "Prof. Okoro", "This plan", "NASA", "Anna", "Everyone"]
VERBS = ["crosses", "remembers", "builds", "doesn't like", "can't forget", "watches", "paints", "sells", "will mend", "cannot find"]
OBJECTS = ["the bridge", "a quiet garden", "3.5 litres of milk", "every well-known song", "it at 5 p.m. sharp", "bread, salt and tea",
           "two letters (one was lost)", "the end of the road", "a map, i.e. a drawing", "MANY THINGS", "the [name] of the town", "No. 7"]
ENDS = [".", ".", ".", "!", "?", "...", ".\"", "?!"]
LINES = ["* one\n* two\n* three", "- first point\n- second point", "*marked words* and **strong words**", "<<A title>>", "<< >>",
         "Section 1\nText here.\nSection 2\nMore text.", "SECTION 1 Text SECTION 2 Text SECTION 3", "P.S. Write soon.", "P.P.S I forgot.",
         "p. s. small", "My answer is yes.", "My answer is maybe.", "[place] and [date]", "DON'T SHOUT AT ME, I'M HERE.",
         "HELLO-WORLD is U.S.A. CANNOT", "first part *** second part *** third part", "one answer ****** another answer",
         "***\nlone part\n***", "* * *", "a *b* c ** d ** e", "PS: none"]
WHOLE = ['{"a": 1, "b": [true, null]}', '```json\n{"a": 1}\n```', "```\n[1, 2]\n```", "{'a': 1}", '"All of it is quoted."', '"', '""',
         "ALL OF THIS IS WRITTEN IN CAPITALS AND IT IS ENGLISH TEXT.", "all of this is written in small letters and it is english text.",
         "Das ist ein Satz auf Deutsch, und er ist lang genug, um erkannt zu werden.", "Ceci est une phrase écrite en français, assez longue.",
         "Esta es una frase bastante larga que está escrita en español.", "これは日本語で書かれた十分に長い文章です。",
         "Это достаточно длинное предложение на русском языке.", "Questa frase è scritta in italiano ed è abbastanza lunga.",
         "one\n\ntwo words\n\n'three", "First paragraph.\n\nSecond one here.\n\nThird, at last.", "a\n\n\n\nb", "\n\nlate start\n\nnext",
         "same ****** same", "left****** right ******", "x ****** ****** y", "tea tea Tea TEA", "No commas at all here", "   ", "7 8 9"]
KEYWORDS = ["the", "tea", "bridge", "find", "art", "one", "letters"]


def answers(random):
    for text in WHOLE + LINES:
        yield text
    for _ in range(130):
        sentences = [f"{random.choice(SUBJECTS)} {random.choice(VERBS)} {random.choice(OBJECTS)}{random.choice(ENDS)}"
                     for _ in range(random.randint(1, 6))]
        pieces = ["".join(f"{s}{random.choice([' ', ' ', ' ', chr(10), chr(10) * 2])}" for s in sentences).strip()]
        if random.random() < 0.6:
            pieces.insert(random.randint(0, 1), random.choice(LINES))
        yield random.choice(["\n\n", "\n", " *** ", " ****** "]).join(pieces)


def near(random, count):
    return max(0, count + random.choice([-1, 0, 0, 1]))


def instructions(random, text, util):
    """Yields instructions with arguments near what the text has."""
    relation = lambda: random.choice(["less than", "at least"])
    words = re.findall(r"\w+", text) or ["x"]
    pick = lambda: random.choice(words + KEYWORDS)
    yield "keywords:existence", {"keywords": [pick(), pick()]}
    word = pick()
    yield "keywords:frequency", {"keyword": word, "relation": relation(), "frequency": near(random, text.lower().count(word.lower()))}
    yield "keywords:forbidden_words", {"forbidden_words": [random.choice(KEYWORDS), pick()[:4]]}
    letter = random.choice("aeostz")
    yield "keywords:letter_frequency", {"letter": letter, "let_relation": relation(), "let_frequency": near(random, text.lower().count(letter))}
    yield "language:response_language", {"language": random.choice(["en", "en", "de", "fr", "es", "ja", "ru", "it"])}
    yield "length_constraints:number_sentences", {"relation": relation(), "num_sentences": near(random, util.count_sentences(text))}
    yield "length_constraints:number_paragraphs", {"num_paragraphs": near(random, text.count("***") + 1)}
    yield "length_constraints:number_words", {"relation": relation(), "num_words": near(random, len(words))}
    parts = text.split("\n\n")
    nth = random.randint(1, len(parts))
    first = (parts[nth - 1].split() or ["x"])[0].strip("'\"").rstrip(".,?!'\"") or "x"
    yield "length_constraints:nth_paragraph_first_word", {"num_paragraphs": max(near(random, len(parts)), nth), "nth_paragraph": nth,
                                                          "first_word": first}
    yield "detectable_content:number_placeholders", {"num_placeholders": near(random, text.count("["))}
    yield "detectable_content:postscript", {"postscript_marker": random.choice(["P.S.", "P.P.S", "PS:"])}
    yield "detectable_format:number_bullet_lists", {"num_bullets": near(random, text.count("\n* ") + text.count("\n- ") + 1)}
    yield "detectable_format:constrained_response", {}
    yield "detectable_format:number_highlighted_sections", {"num_highlights": near(random, text.count("*") // 2)}
    yield "detectable_format:multiple_sections", {"section_spliter": random.choice(["Section", "SECTION"]), "num_sections": random.randint(1, 3)}
    yield "detectable_format:json_format", {}
    yield "detectable_format:title", {}
    yield "combination:two_responses", {}
    yield "combination:repeat_prompt", {"prompt_to_repeat": (text.strip()[: random.randint(1, 12)].strip() or "x").upper()}
    yield "startend:end_checker", {"end_phrase": (text.strip()[-random.randint(1, 12):].strip() or "x").upper()}
    yield "startend:quotation", {}
    yield "change_case:capital_word_frequency", {"capital_relation": relation(),
                                                 "capital_frequency": near(random, len(re.findall(r"\b[A-Z]+\b", text)))}
    yield "change_case:english_capital", {}
    yield "change_case:english_lowercase", {}
    yield "punctuation:no_comma", {}


def main():
    nltk.data.path.insert(0, sys.argv[1])
    langdetect.DetectorFactory.seed = 0
    # Only fetches the published prompts, which are not used here.
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)
    from if_verifiable.ifeval import instructions_registry, instructions_util

    chance = random.Random(SEED)
    cases = []
    for text in answers(chance):
        all_of = list(instructions(chance, text, instructions_util))
        # Every kind meets the short hand-made ones; of the longer texts each sees a third of the kinds.
        chosen = all_of if len(text) < 90 else chance.sample(all_of, 9)
        rows = []
        for name, arguments in chosen:
            checker = instructions_registry.INSTRUCTION_DICT[name](name)
            checker.build_description(**arguments)
            rows.append([{"instruction": name, **arguments}, bool(text.strip() and checker.check_following(text))])
        cases.append({"answer": text, "verdicts": rows})
    out = Path(sys.argv[2] if len(sys.argv) > 2 else "tests/golden/ifeval.json")
    out.write_text("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")
    verdicts = [verdict for case in cases for _, verdict in case["verdicts"]]
    print(f"{len(cases)} answers, {len(verdicts)} verdicts, {sum(verdicts)} of them true")


if __name__ == "__main__":
    main()
