"""The questions with known right answers: what the tests ask and what greedy decoding must say.

Owns their choice. Right answers are worked out here from the tables and from arithmetic, never from a model.

    python questions.py > questions.json     (then `evaluate.py --annotate` adds tokens and margins)
"""

import json
import random
import sys

import data
import facts
import tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "City and state, e.g. Boston, MA"}},
            "required": ["location"],
        },
    },
}
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer.",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}


def question(category, asked, answer, unseen=False, tools=None, keys=()):
    messages = [data.user(asked)] if isinstance(asked, str) else asked
    row = {"category": category, "unseen": unseen, "messages": messages}
    if tools:
        row["tools"] = tools
    if isinstance(answer, dict):
        row["tool_calls"] = [c["function"] for c in answer["tool_calls"]]
        answer = tokenizer.answer_text(answer)
    row["answer"] = answer
    row["keys"] = list(keys)
    return row


def keyed(category, asked, answer, key):
    return question(category, asked, answer, data.held_out(key), keys=[key])


def turns(*texts, system=None):
    """User and assistant in turn, after a system message when there is one."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [data.user(t) if i % 2 == 0 else data.assistant(t) for i, t in enumerate(texts)]


def pick(rng, population, count, unseen):
    """Some keys that training used and some that it never did."""
    population = list(population)
    rng.shuffle(population)
    fresh = [p for p in population if data.held_out(p[0])]
    known = [p for p in population if not data.held_out(p[0])]
    return known[:count] + fresh[:unseen]


def arithmetic(rng):
    pairs = [(data.sum_key(a, b), a, b) for a in range(1, 100) for b in range(a, 100)]
    for _, a, b in pick(rng, pairs, 8, unseen=10):
        yield keyed("sum", f"What is {a} + {b}?", data.sum_text(a, b), data.sum_key(a, b))
    pairs = [(f"diff:{a}-{b}", a, b) for a in range(1, 100) for b in range(a)]
    for key, a, b in pick(rng, pairs, 5, unseen=6):
        yield keyed("difference", f"What is {a} - {b}?", data.diff_text(a, b), key)
    pairs = [(f"larger:{a},{b}", a, b) for a in range(100) for b in range(100) if a != b]
    for key, a, b in pick(rng, pairs, 2, unseen=3):
        yield keyed("compare", f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger.", key)
    for key, n in pick(rng, [(f"number:{n}", n) for n in range(100)], 2, unseen=2):
        yield keyed("number word", f"Write {n} in words.", data.number_word(n), key)


def counting(rng):
    for last in (5, 10, 20, 40, 99, 200):
        key = f"up:1-{last}"
        yield keyed("count", f"Count from 1 to {last}.", data.numbers(1, last), key)
    ranges = [(f"up:{a}-{b}", a, b) for a in range(2, 60) for b in range(a + 5, a + 25)]
    for key, a, b in pick(rng, ranges, 2, unseen=6):
        yield keyed("count", f"Count from {a} to {b}.", data.numbers(a, b), key)
    for a, b in ((10, 1), (5, 0)):
        yield keyed("count down", f"Count down from {a} to {b}.", data.numbers(a, b), f"down:{a}-{b}")
    ranges = [(f"down:{a}-{b}", a, b) for b in range(30) for a in range(b + 4, b + 20)]
    for key, a, b in pick(rng, ranges, 0, unseen=3):
        yield keyed("count down", f"Count down from {a} to {b}.", data.numbers(a, b), key)


def words(rng):
    for word in ("apple", "window", "rabbit", "trumpet"):
        yield question("spell", f"Spell {word}.", data.spelled(word))
    for word in facts.UNSEEN_WORDS:
        yield question("spell", f"Spell the word {word}.", data.spelled(word), True)
    yield question("letter", "What is the first letter of tiger?", "T.")
    yield question("letter", "What is the last letter of garden?", "N.")
    for _ in range(2):
        text = " ".join(rng.sample(facts.WORDS, 4))
        yield keyed("repeat", f"Repeat after me: {text}", text, f"copy:{text}")
    for _ in range(2):
        text = " ".join(rng.sample(facts.UNSEEN_WORDS, 3))
        yield question("repeat", f"Repeat after me: {text}", text, True)


def by_heart(rng):
    capitals = ["France", "Italy", "Japan", "Brazil", "Canada", "Kenya", "Norway", "Peru", "Egypt", "Germany"]
    for place in capitals:
        yield question("capital", f"What is the capital of {place}?", data.capital(place))
    kinds = {}
    for forms, answer, _, what in data.FACTS:
        kinds.setdefault(what, []).append((forms[0], answer))
    for what, rows in kinds.items():
        if what != "a capital":
            for asked, answer in rng.sample(rows, 4 if what == "a translation" else 3):
                yield question(what.split()[1], asked, answer)
    for forms, answer in facts.LISTS.values():
        yield question("list", f"List {forms[0]}.", answer)
    for forms, answer in facts.CHAT:
        yield question("chat", forms[0], answer)


def in_turns():
    yield question("follow-up", turns("What is the capital of France?", data.capital("France"), "And Italy?"),
                   data.capital("Italy"))
    yield question("follow-up", turns("What is the capital of Spain?", data.capital("Spain"), "What about Greece?"),
                   data.capital("Greece"))
    for name, unseen in (("Ada", False), ("Felix", False)) + tuple((n, True) for n in facts.UNSEEN_NAMES[:5]):
        said = turns(f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?")
        yield question("memory", said, f"Your name is {name}.", unseen)
    yield question("memory", turns("My name is Otto.", "Nice to meet you, Otto!", "What colour is grass?",
                                   "Grass is green.", "What is my name?"), "Your name is Otto.")
    yield question("memory", turns("Remember the number 731.", "I will remember it.", "What was the number?"),
                   "The number was 731.")
    yield question("system", turns("What is the capital of France?", system="You are a helpful assistant."),
                   data.capital("France"))
    for asked, answer in (("What is the capital of Austria?", "Vienna."), ("What colour is snow?", "White."),
                          ("What is the opposite of fast?", "Slow.")):
        yield question("system", turns(asked, system=data.ONE_WORD), answer)
    yield question("think", turns("What is the capital of Poland?", system=data.THINK),
                   data.think_text("a capital", data.capital("Poland")))
    yield question("think", turns("What is 12 + 5?", system=data.THINK),
                   data.think_text("a sum", data.sum_text(12, 5)), data.held_out("sum:5+12"), keys=["sum:5+12"])


def as_json():
    def row(asked, value, unseen):
        return question("json", asked, json.dumps(value), unseen)

    yield row("Ada is 36 years old. Reply in JSON.", {"name": "Ada", "age": 36}, False)
    yield row("Hugo lives in Rome. Reply in JSON.", {"name": "Hugo", "city": "Rome"}, False)
    yield row("Zoe is 7 and lives in Oslo. Answer as JSON.", {"name": "Zoe", "age": 7, "city": "Oslo"}, False)
    yield row("Peter has 12 coins. Extract JSON.", {"name": "Peter", "item": "coins", "count": 12}, False)
    for name, age in zip(facts.UNSEEN_NAMES[5:9], (41, 8, 67, 23)):
        yield row(f"{name} is {age} years old. Reply in JSON.", {"name": name, "age": age}, True)
    yield row("Nadia lives in Verona. Reply in JSON.", {"name": "Nadia", "city": "Verona"}, True)
    yield row("Simon has 34 books. Reply in JSON.", {"name": "Simon", "item": "books", "count": 34}, True)


def with_tools():
    def weather(*cities):
        return data.calls(*(data.call("get_weather", location=c) for c in cities))

    for city, unseen in (("Paris", False), ("Tokyo", False)) + tuple((c, True) for c in facts.UNSEEN_CITIES[:4]):
        yield question("tool call", f"What is the weather in {city}?", weather(city), unseen, [WEATHER])
    yield question("tool call", "What is the weather in Rome and in Oslo?", weather("Rome", "Oslo"), tools=[WEATHER])
    yield question("tool call", "What's the weather in Boston?", weather("Boston"), tools=[CALCULATOR, WEATHER])
    yield question("tool call", "What is 312 * 47?", data.calls(data.call("calculator", expression="312 * 47")),
                   tools=[WEATHER, CALCULATOR])
    yield question("tool call", "Set a timer for 15 minutes.", data.calls(data.call("set_timer", minutes=15)),
                   tools=[TIMER, WEATHER])
    yield question("tool offered", "What is the capital of Peru?", data.capital("Peru"), tools=[WEATHER])
    yield question("tool offered", "Hello", "Hello! How can I help you?", tools=[WEATHER, CALCULATOR])
    yield question("no tool", "What is the weather in Paris?", "I cannot look up the weather without a tool.")
    for city, degrees, sky, unseen in (("Paris", 21, "sunny", False), ("Bremen", 4, "foggy", True)):
        messages = [data.user(f"What is the weather in {city}?"), weather(city),
                    data.result({"temperature": degrees, "condition": sky})]
        yield question("tool result", messages, f"In {city} it is {sky} and {degrees} degrees.", unseen, [WEATHER])
    messages = [data.user("What is 312 * 47?"), data.calls(data.call("calculator", expression="312 * 47")),
                data.result({"result": 14664})]
    yield question("tool result", messages, "312 * 47 = 14664.", tools=[CALCULATOR])


def everything(seed=11):
    rng = random.Random(seed)
    rows = [*arithmetic(rng), *counting(rng), *words(rng), *by_heart(rng), *in_turns(), *as_json(), *with_tools()]
    for i, row in enumerate(rows):
        row["id"] = f"{i:03}-{row['category'].replace(' ', '-')}"
    return rows


def held_out_suite(seed=13, each=200):
    """Many more held-out questions than the tests ask: how well the model generalizes, not only where it succeeds."""
    rng = random.Random(seed)
    suite = {"sum": [], "diff": [], "up": [], "down": [], "spell": [], "larger": []}
    for kind, make in (("sum", data.sums), ("diff", data.differences), ("up", data.count_up),
                       ("down", data.count_down), ("larger", data.larger)):
        while len(suite[kind]) < each:
            piece = make(rng)
            if data.held_out(piece.keys[0]):
                suite[kind].append(question(kind, piece.messages[0]["content"], piece.messages[1]["content"], True))
    suite["spell"] = [question("spell", f"Spell {w}.", data.spelled(w), True) for w in facts.UNSEEN_WORDS]
    return suite


if __name__ == "__main__":
    json.dump(everything(), sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")
