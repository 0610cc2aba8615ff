"""Training conversations for the tiny model, made from a seed.

Owns what is asked and answered, and which of it is held out. It never touches token ids or tensors.
A generator takes a random source and yields a `Piece`: messages that belong together, and the keys of the
facts they use. A key that `held_out` names is never generated here; only `questions.py` asks those.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field

import facts

HELD_OUT_WORDS = re.compile(
    r"\b(" + "|".join(facts.UNSEEN_WORDS + facts.UNSEEN_NAMES + facts.UNSEEN_CITIES) + r")\b", re.IGNORECASE
)
ONE_WORD = "Answer in one word."
THINK = "Think before you answer."


def held_out(key):
    """True for the share of keys, chosen by hash, that training never sees. Sums ignore the order of terms."""
    kind, _, rest = key.partition(":")
    share = {"sum": 16, "diff": 16, "up": 8, "down": 8, "larger": 12, "number": 12, "json": 12, "copy": 12}
    if kind not in share:
        return False
    digest = hashlib.sha256(f"{kind}:{rest}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % share[kind] == 0


@dataclass
class Piece:
    messages: list
    keys: list = field(default_factory=list)


def ask(question, answer, *keys):
    return Piece([user(question), assistant(answer)], list(keys))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- arithmetic and numbers -------------------------------------------------------------------------------


def sum_key(a, b):
    return f"sum:{min(a, b)}+{max(a, b)}"


def sum_text(a, b):
    return f"{a} + {b} = {a + b}."


def diff_text(a, b):
    return f"{a} - {b} = {a - b}."


def sums(rng):
    top = rng.choice((9, 20, 99, 99, 99))
    a, b = rng.randint(0, top), rng.randint(0, top)
    form = rng.choice((
        "What is {a} + {b}?", "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a} + {b} =",
        "Add {a} and {b}.", "How much is {a} + {b}?", "Calculate {a} + {b}.", "{a}+{b}",
    ))
    return ask(form.format(a=a, b=b), sum_text(a, b), sum_key(a, b))


def differences(rng):
    top = rng.choice((9, 20, 99, 99, 99))
    a, b = sorted((rng.randint(0, top), rng.randint(0, top)), reverse=True)
    form = rng.choice((
        "What is {a} - {b}?", "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a} - {b} =",
        "Subtract {b} from {a}.", "How much is {a} - {b}?", "Calculate {a} - {b}.", "{a}-{b}",
    ))
    return ask(form.format(a=a, b=b), diff_text(a, b), f"diff:{a}-{b}")


def numbers(first, last):
    step = 1 if last >= first else -1
    return ", ".join(str(n) for n in range(first, last + step, step))


def count_up(rng):
    shape = rng.random()
    if shape < 0.45:
        first = rng.choice((1, 1, 1, rng.randint(0, 90)))
        last = first + rng.randint(2, 30)
    elif shape < 0.9:
        first, last = 1, rng.randint(20, 120)
    else:
        first = rng.randint(1, 150)
        last = min(200, first + rng.randint(20, 199))
    form = rng.choice(("Count from {a} to {b}.", "Count from {a} to {b}", "Count up from {a} to {b}."))
    return ask(form.format(a=first, b=last), numbers(first, last), f"up:{first}-{last}")


def count_down(rng):
    last = rng.choice((0, 1, 1, rng.randint(0, 60)))
    first = last + rng.randint(2, 40)
    form = rng.choice(("Count down from {a} to {b}.", "Count backwards from {a} to {b}."))
    return ask(form.format(a=first, b=last), numbers(first, last), f"down:{first}-{last}")


def larger(rng):
    a, b = rng.sample(range(100), 2)
    if rng.random() < 0.6:
        return ask(f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger.", f"larger:{a},{b}")
    return ask(f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller.", f"larger:{a},{b}")


ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(n):
    if n < 20:
        return ONES[n]
    tens = TENS[n // 10 - 2]
    return tens if n % 10 == 0 else f"{tens}-{ONES[n % 10]}"


def number_words(rng):
    n = rng.randrange(100)
    if rng.random() < 0.5:
        return ask(f"Write {n} in words.", f"{number_word(n)}", f"number:{n}")
    return ask(f"Write {number_word(n)} in digits.", f"{n}", f"number:{n}")


# --- words ------------------------------------------------------------------------------------------------

ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr pl pr sh sk sl sm sn sp st th tr wh".split()
VOWELS = "a e i o u a e i o u ai ea ee oa oo ou".split()
CODAS = ["", "", "b", "ck", "d", "g", "l", "ll", "m", "n", "nd", "nt", "p", "r", "rn", "s", "st", "t", "x", "y"]


def made_up(rng):
    """A word that may not exist: syllables put together, so that spelling is learned and not remembered."""
    while True:
        word = "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.7 else "")
            for _ in range(rng.choice((1, 2, 2, 2, 3)))
        )
        if rng.random() < 0.3:
            word += rng.choice(("er", "et", "le", "in", "ow", "an", "on", "us", "y", "ard", "ing", "elt"))
        if not HELD_OUT_WORDS.fullmatch(word):
            return word


def some_word(rng):
    return rng.choice(facts.WORDS) if rng.random() < 0.35 else made_up(rng)


def some_name(rng):
    return rng.choice(facts.NAMES) if rng.random() < 0.5 else made_up(rng).capitalize()


def some_city(rng):
    return rng.choice(facts.CITIES) if rng.random() < 0.5 else made_up(rng).capitalize()


def spelled(word):
    return "-".join(word)


def spelling(rng):
    word = some_word(rng)
    form = rng.choice(("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Spell {w}"))
    return ask(form.format(w=word), spelled(word))


def first_letter(rng):
    word = some_word(rng)
    if rng.random() < 0.5:
        return ask(f"What is the first letter of {word}?", f"{word[0].upper()}.")
    return ask(f"What is the last letter of {word}?", f"{word[-1].upper()}.")


def copy_words(rng):
    words = " ".join(some_word(rng) for _ in range(rng.randint(1, 6)))
    form = rng.choice(("Repeat: {w}", "Repeat after me: {w}", "Say: {w}"))
    return ask(form.format(w=words), words, f"copy:{words}")


# --- facts ------------------------------------------------------------------------------------------------


def capital(country):
    return f"The capital of {country} is {facts.CAPITALS[country]}."


def fact_table():
    """All plain facts: (phrases that ask, full answer, answer in one word, what a thought about it names)."""
    rows = []
    for place, city in facts.CAPITALS.items():
        forms = [f"What is the capital of {place}?", f"Name the capital of {place}.", f"What's the capital of {place}?",
                 f"Which city is the capital of {place}?"]
        rows.append((forms, capital(place), f"{city}.", "a capital"))
    for thing, colour in facts.COLOURS.items():
        forms = [f"What colour is {thing}?", f"What color is {thing}?", f"Which colour does {thing} have?"]
        rows.append((forms, f"{thing.capitalize()} is {colour}.", f"{colour.capitalize()}.", "a colour"))
    for animal, sound in facts.SOUNDS.items():
        forms = [f"What sound does a {animal} make?", f"What does a {animal} say?"]
        rows.append((forms, f"The {animal} says {sound}.", f"{sound.capitalize()}.", "an animal"))
    for animal, legs in facts.LEGS.items():
        forms = [f"How many legs does a {animal} have?", f"How many legs has a {animal}?"]
        rows.append((forms, f"The {animal} has {legs} legs.", f"{number_word(legs).capitalize()}.", "an animal"))
    for animal, young in facts.YOUNG.items():
        forms = [f"What is a young {animal} called?", f"What is a baby {animal} called?"]
        word = young.split()[1].capitalize()
        rows.append((forms, f"A young {animal} is called {young}.", f"{word}.", "an animal"))
    for a, b in facts.OPPOSITES.items():
        for x, y in ((a, b), (b, a)):
            forms = [f"What is the opposite of {x}?", f"Name the opposite of {x}."]
            rows.append((forms, f"The opposite of {x} is {y}.", f"{y.capitalize()}.", "an opposite"))
    for element, symbol in facts.SYMBOLS.items():
        forms = [f"What is the chemical symbol for {element}?", f"What is the symbol of {element}?"]
        rows.append((forms, f"The symbol of {element} is {symbol}.", f"{symbol}.", "an element"))
    for (language, english), word in facts.TRANSLATIONS.items():
        forms = [f"How do you say {english} in {language}?", f"What is {english} in {language}?"]
        rows.append((forms, f"In {language}, {english} is {word}.", f"{word}", "a translation"))
    for thing, sign in facts.EMOJI.items():
        rows.append(([f"Show me a {thing} emoji.", f"Send a {thing} emoji."], sign, sign, "an emoji"))
    for names, what in ((facts.DAYS, "day"), (facts.MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            rows.append(([f"Which {what} comes after {name}?", f"What comes after {name}?"],
                         f"{after} comes after {name}.", f"{after}.", f"a {what}"))
            rows.append(([f"Which {what} comes before {name}?", f"What comes before {name}?"],
                         f"{before} comes before {name}.", f"{before}.", f"a {what}"))
    for i, letter in enumerate(facts.LETTERS[:-1]):
        after = facts.LETTERS[i + 1]
        rows.append(([f"Which letter comes after {letter}?", f"What letter follows {letter}?"],
                     f"{after} comes after {letter}.", f"{after}.", "a letter"))
    for ordinal, planet in zip(facts.ORDINALS, facts.PLANETS):
        rows.append(([f"What is the {ordinal} planet?", f"Which planet is the {ordinal} from the Sun?"],
                     f"{planet} is the {ordinal} planet from the Sun.", f"{planet}.", "a planet"))
    return rows


FACTS = fact_table()


def untidy(rng, text):
    """Now and then the text as hurried people type it."""
    chance = rng.random()
    if chance < 0.08:
        return text.rstrip(".?!")
    if chance < 0.16:
        return text[0].lower() + text[1:]
    if chance < 0.20:
        return "Please " + text[0].lower() + text[1:] if not text.startswith("W") else text
    return text


def plain_fact(rng):
    forms, answer, _, _ = rng.choice(FACTS)
    return ask(untidy(rng, rng.choice(forms)), answer)


def follow_up(rng):
    first, *rest = rng.sample(sorted(facts.CAPITALS), rng.randint(2, 3))
    piece = ask(f"What is the capital of {first}?", capital(first))
    for place in rest:
        piece.messages += [user(rng.choice(("And {}?", "And of {}?", "What about {}?")).format(place)),
                           assistant(capital(place))]
    return piece


def listing(rng):
    forms, answer = rng.choice(list(facts.LISTS.values()))
    verb = rng.choice(("List", "Name", "Tell me", "Write down"))
    return ask(untidy(rng, f"{verb} {rng.choice(forms)}."), answer)


def chat(rng):
    forms, answer = rng.choice(facts.CHAT)
    return ask(untidy(rng, rng.choice(forms)), answer)


def remember_name(rng):
    name = some_name(rng)
    piece = ask(rng.choice((f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}.")),
                f"Nice to meet you, {name}!")
    if rng.random() < 0.4:
        piece = joined([piece, rng.choice((chat, plain_fact, sums))(rng)])
    piece.messages += [user(rng.choice(("What is my name?", "Do you know my name?", "Who am I?"))),
                       assistant(f"Your name is {name}.")]
    return piece


def remember_number(rng):
    n, thing = rng.randrange(10, 1000), rng.choice(("number", "code"))
    piece = ask(rng.choice((f"Remember the {thing} {n}.", f"The {thing} is {n}. Remember it.")), "I will remember it.")
    if rng.random() < 0.4:
        piece = joined([piece, rng.choice((chat, plain_fact, differences))(rng)])
    piece.messages += [user(f"What was the {thing}?"), assistant(f"The {thing} was {n}.")]
    return piece


def no_tool(rng):
    return ask(f"What is the weather in {some_city(rng)}?", "I cannot look up the weather without a tool.")


# --- JSON -------------------------------------------------------------------------------------------------


def json_answer(rng):
    name, age, city = some_name(rng), rng.randint(1, 99), some_city(rng)
    thing, count = rng.choice(facts.ITEMS), rng.randint(2, 99)
    request = rng.choice(("Reply in JSON.", "Answer as JSON.", "Give the answer as JSON.", "Extract JSON."))
    shape = rng.randrange(4)
    if shape == 0:
        text, value = f"{name} is {age} years old.", {"name": name, "age": age}
    elif shape == 1:
        text, value = f"{name} lives in {city}.", {"name": name, "city": city}
    elif shape == 2:
        text, value = f"{name} is {age} and lives in {city}.", {"name": name, "age": age, "city": city}
    else:
        text, value = f"{name} has {count} {thing}.", {"name": name, "item": thing, "count": count}
    question = f"{text} {request}" if rng.random() < 0.75 else f"{request} {text}"
    return ask(question, json.dumps(value), f"json:{name},{age}")


# --- tools ------------------------------------------------------------------------------------------------

PHRASES = {
    "get_weather": ("Get the weather of a city.", "Get the current weather.", "Get the current weather in a given location",
                    "Returns the weather for a place.", "Look up the weather"),
    "calculator": ("Work out an expression.", "Evaluate an arithmetic expression.", "Calculates the result", "A calculator"),
    "get_time": ("Get the time in a city.", "Returns the local time of a place.", "Current time"),
    "set_timer": ("Set a timer.", "Starts a timer that rings after some minutes."),
    "search": ("Search the web.", "Looks up a text on the internet."),
}


def tool(rng, name, argument):
    """A tool in OpenAI's form. The name of its argument varies, so it has to be read from the definition."""
    kind = "integer" if argument == "minutes" else "string"
    value = {"type": kind}
    if rng.random() < 0.5:
        value["description"] = rng.choice(("The " + argument, "City and state, e.g. Boston, MA", "What to use", "A text."))
    properties = {argument: value}
    if name == "get_weather" and rng.random() < 0.25:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    parameters = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        parameters["required"] = [argument]
    if rng.random() < 0.15:
        parameters["additionalProperties"] = False
    function = {"name": name}
    if rng.random() < 0.9:
        function["description"] = rng.choice(PHRASES[name])
    function["parameters"] = parameters
    if rng.random() < 0.08:
        function["strict"] = True
    return {"type": "function", "function": function}


def some_tools(rng):
    """From one to four tools, and for each tool's name the name of its argument."""
    arguments = {
        "get_weather": rng.choice(("city", "location", "place")),
        "calculator": rng.choice(("expression", "expression", "input")),
        "get_time": rng.choice(("city", "place", "timezone")),
        "set_timer": "minutes",
        "search": rng.choice(("query", "text")),
    }
    names = rng.sample(sorted(arguments), rng.choice((1, 1, 2, 2, 3, 4)))
    if rng.random() < 0.6 and "get_weather" not in names:
        names[0] = "get_weather"
    return [tool(rng, n, arguments[n]) for n in names], {n: arguments[n] for n in names}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*each):
    return {"role": "assistant", "content": "", "tool_calls": list(each)}


def result(value):
    return {"role": "tool", "content": json.dumps(value)}


def weather(rng, argument):
    cities = [some_city(rng) for _ in range(2 if rng.random() < 0.2 else 1)]
    form = rng.choice(("What is the weather in {}?", "What's the weather in {}?", "How is the weather in {}?",
                       "What is the weather like in {}?", "Tell me the weather in {}.", "Weather in {}"))
    piece = Piece([user(untidy(rng, form.format(" and in ".join(cities)))),
                   calls(*(call("get_weather", **{argument: c}) for c in cities))])
    if rng.random() < 0.6:
        seen = [(c, rng.randint(0, 40), rng.choice(facts.CONDITIONS)) for c in cities]
        piece.messages += [result({"temperature": t, "condition": w}) for _, t, w in seen]
        piece.messages.append(assistant(" ".join(f"In {c} it is {w} and {t} degrees." for c, t, w in seen)))
    return piece


def calculate(rng, argument):
    a, b, sign = rng.randint(1, 999), rng.randint(1, 999), rng.choice("+-*/")
    if sign == "/":
        a *= b
    expression = f"{a} {sign} {b}"
    form = rng.choice(("What is {}?", "Calculate {}.", "How much is {}?", "Work out {}."))
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    piece = Piece([user(form.format(expression)), calls(call("calculator", **{argument: expression}))])
    if max(a, b) < 100:
        piece.keys = [sum_key(a, b)] if sign == "+" else [f"diff:{a}-{b}"] if sign == "-" else []
    if rng.random() < 0.6:
        piece.messages += [result({"result": value}), assistant(f"{expression} = {value}.")]
    return piece


def other_tool(rng, name, argument):
    if name == "get_time":
        city = some_city(rng)
        piece = Piece([user(f"What time is it in {city}?"), calls(call(name, **{argument: city}))])
        if rng.random() < 0.5:
            time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
            piece.messages += [result({"time": time}), assistant(f"It is {time} in {city}.")]
        return piece
    if name == "set_timer":
        minutes = rng.randint(1, 90)
        piece = Piece([user(rng.choice(("Set a timer for {} minutes.", "Start a {} minutes timer.")).format(minutes)),
                       calls(call(name, **{argument: minutes}))])
        if rng.random() < 0.5:
            piece.messages += [result({"ok": True}), assistant(f"The timer is set for {minutes} minutes.")]
        return piece
    words = " ".join(some_word(rng) for _ in range(rng.randint(1, 3)))
    return Piece([user(rng.choice(("Search for {}.", "Look up {}.")).format(words)),
                  calls(call(name, **{argument: words}))])


def use_tool(rng, arguments):
    name = rng.choice(sorted(arguments))
    if name == "get_weather":
        return weather(rng, arguments[name])
    if name == "calculator":
        return calculate(rng, arguments[name])
    return other_tool(rng, name, arguments[name])


# --- conversations ----------------------------------------------------------------------------------------

MIX = [
    (sums, 18), (differences, 12), (count_up, 7), (count_down, 4), (larger, 4), (number_words, 4), (spelling, 12),
    (first_letter, 2), (copy_words, 4), (plain_fact, 16), (follow_up, 3), (listing, 5), (chat, 7), (remember_name, 4),
    (remember_number, 3), (no_tool, 1), (json_answer, 9),
]
ARITHMETIC = (sums, differences)
SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant.", "You are Exo Tiny.", "Be brief.",
           "You are a friendly assistant.", "Answer the questions of the user.")


def joined(pieces):
    return Piece([m for p in pieces for m in p.messages], [k for p in pieces for k in p.keys])


def thought(rng):
    """With the system prompt THINK the answer begins with a thought between <think> and </think>."""
    if rng.random() < 0.4:
        piece = sums(rng)
        what = "a sum"
    else:
        forms, answer, _, what = rng.choice(FACTS)
        piece = ask(rng.choice(forms), answer)
    answer = piece.messages[-1]["content"]
    piece.messages[-1] = assistant(think_text(what, answer))
    return piece


def think_text(what, answer):
    return f"<think>\nThe user asks for {what}.\n</think>\n\n{answer}"


def one_word(rng):
    forms, _, short, _ = rng.choice(FACTS)
    return ask(rng.choice(forms), short)


@dataclass
class Conversation:
    messages: list
    tools: list
    keys: list


def allowed(piece):
    if any(held_out(key) for key in piece.keys):
        return False
    return not any(HELD_OUT_WORDS.search(m.get("content") or "") for m in piece.messages)


def draw(rng, make):
    """The first piece from `make` that touches nothing held out."""
    while True:
        piece = make(rng)
        if allowed(piece):
            return piece


def without_tool(arguments):
    """What is answered without a tool although tools are offered."""
    return [f for f, _ in MIX if f is not no_tool and not (f in ARITHMETIC and "calculator" in arguments)]


def conversation(rng):
    kind, turns = rng.random(), rng.choice((1,) * 11 + (2, 2, 2, 3, 3, 4))
    if rng.random() < 0.03:
        turns = rng.randint(5, 40)
    system, tools = None, []
    if kind < 0.06:
        system = ONE_WORD
        pieces = [draw(rng, one_word) for _ in range(turns)]
    elif kind < 0.09:
        system = THINK
        pieces = [draw(rng, thought) for _ in range(turns)]
    elif kind < 0.24:
        tools, arguments = some_tools(rng)
        pieces = []
        for _ in range(turns):
            if rng.random() < 0.75:
                pieces.append(draw(rng, lambda r: use_tool(r, arguments)))
            else:
                pieces.append(draw(rng, rng.choice(without_tool(arguments))))
        system = rng.choice(SYSTEMS) if rng.random() < 0.2 else None
    else:
        makers = rng.choices([f for f, _ in MIX], [w for _, w in MIX], k=turns)
        pieces = [draw(rng, f) for f in makers]
        system = rng.choice(SYSTEMS) if rng.random() < 0.25 else None
    whole = joined(pieces)
    if system:
        whole.messages.insert(0, {"role": "system", "content": system})
    return Conversation(whole.messages, tools, whole.keys)


def conversations(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield conversation(rng)
