"""Asks a running cluster known questions with the official client: streaming and not, side by side."""

import argparse
import concurrent.futures
import json

import openai

# Tokens. A CPU makes some tens a second.
MAX_ANSWER = 24


def options(question):
    chosen = {"model": "tiny", "messages": question["messages"], "temperature": 0,
              "max_tokens": 1024}
    if question.get("tools"):
        chosen["tools"] = question["tools"]
    return chosen


def text_of(message):
    """The answer as the model wrote it, tool calls rendered back."""
    calls = [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in message.tool_calls or []
    ]
    return message.content or "", calls


def expected(question):
    content, *calls = question["answer"].split("<tool_call>")
    return content.strip(), [json.loads(call.partition("</tool_call>")[0]) for call in calls]


def ask(client, question):
    completion = client.chat.completions.create(**options(question))
    choice = completion.choices[0]
    assert choice.finish_reason in ("stop", "tool_calls"), choice
    assert completion.usage.completion_tokens > 0, completion.usage
    assert completion.usage.total_tokens == (
        completion.usage.prompt_tokens + completion.usage.completion_tokens)
    content, calls = text_of(choice.message)
    return content.strip(), calls


def ask_streaming(client, question):
    text, finishes, chunks = "", [], 0
    with client.chat.completions.create(**options(question), stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                chunks += 1
                text += choice.delta.content or ""
                if choice.finish_reason:
                    finishes.append(choice.finish_reason)
    assert len(finishes) == 1, finishes
    return text.strip(), chunks


def check_seeds(client):
    """The same seed draws the same; over several seeds, answers to an open prompt differ."""
    def answer(seed):
        completion = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Tell me something."}],
            temperature=2, max_tokens=48, seed=seed)
        return completion.choices[0].message.content

    answers = [answer(seed) for seed in range(1, 6)]
    assert answers == [answer(seed) for seed in range(1, 6)], answers
    assert len(set(answers)) > 1, answers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--questions", required=True)
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key="anything", max_retries=0)
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").id == "tiny"

    with open(args.questions, encoding="utf-8") as file:
        # Long answers have tests of their own; these many short ones cover every kind.
        questions = [q for q in json.load(file) if len(q["answer_tokens"]) <= MAX_ANSWER]
    assert len(questions) >= 100
    assert sum(bool(q.get("unseen")) for q in questions) >= 20
    # More requests at once than the instance runs: the rest wait their turn.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda q: ask(client, q), questions))
    wrong = [(q["messages"][-1]["content"], a, expected(q))
             for q, a in zip(questions, answers)
             if a != expected(q)]
    assert not wrong, f"{len(wrong)} of {len(questions)} are wrong: {wrong[:5]}"

    plain = [q for q in questions if "<tool_call>" not in q["answer"]][:20]
    for question in plain:
        text, chunks = ask_streaming(client, question)
        assert text == question["answer"].strip(), (text, question["answer"])
        # Tokens come as they are made, not in one piece at the end.
        assert chunks >= 2, chunks

    try:
        client.chat.completions.create(model="nope", messages=plain[0]["messages"])
        raise AssertionError("an unknown model was served")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    try:
        client.chat.completions.create(model="tiny", messages="hello")
        raise AssertionError("wrong types were accepted")
    except openai.BadRequestError as error:
        assert error.param == "messages", error

    check_seeds(client)
    print(f"{len(questions)} answers right")


if __name__ == "__main__":
    main()
