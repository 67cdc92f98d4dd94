"""How well a model has learned the grammar: recall of facts, perplexity, and how often a story of its own is right."""

import math
from collections import Counter
from typing import Any

from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED, KINDS, Story, ask, tell
from paged_infer.storyteller.stories.reader import read

MAX_SAMPLED_TOKENS = 900


def document(story: Story) -> str:
    """The story as training saw it, between two `<|endoftext|>`: the first asks for a story, the last is its end."""
    return END + story.text + END


def quizzes(story: Story) -> list[tuple[str, str]]:
    """(prompt, true answer) for each question, each prompt with the questions and answers before it."""
    body = story.text[: len(story.text) - len("".join(map(ask, story.questions)))]
    found = []
    for question in story.questions:
        found.append((f"{END}{body}Q: {question.question}\nA:", question.answer))
        body += ask(question)
    return found


def kind_of(question: str) -> str:
    """The first two words of a question, such as "How many"."""
    return " ".join(question.split()[:2])


def evaluate(llm: Any, num_stories: int = 100) -> dict[str, Any]:
    """Recall, perplexity and the grammar's perplexity on `num_stories` stories that training never saw.

    `llm` is a `paged_infer.LLM`, or anything whose `generate` does the same.

    - `recall`: share of the questions whose greedy answer equals the true answer exactly.
    - `recall_by_kind`: (right, asked) for the questions that begin with the same two words.
    - `perplexity`: exp of the model's mean nats per token on the documents.
    - `grammar_perplexity`: the same for the grammar itself, which no model can beat except by chance.

    Both perplexities are over the same tokens: all of a document after its leading `<|endoftext|>`, so the first
    word is predicted too, and the closing `<|endoftext|>`, the decision to end, is counted.
    """
    from paged_infer.outputs import prompt_token_logprobs
    from paged_infer.params import SamplingParams

    if num_stories < 1:
        raise ValueError(f"num_stories={num_stories}: must be at least 1")
    stories = [tell(FIRST_EVALUATION_SEED + i) for i in range(num_stories)]

    asked = [quiz for story in stories for quiz in quizzes(story)]
    greedy = SamplingParams(temperature=0, max_tokens=24, stop=["\n"])
    answers = llm.generate([prompt for prompt, _ in asked], greedy, use_tqdm=False)
    kinds = [kind_of(prompt.rsplit("Q: ", 1)[1]) for prompt, _ in asked]
    right = Counter(
        kind
        for kind, got, (_, answer) in zip(kinds, answers, asked, strict=True)
        if got.outputs[0].text.strip() == answer
    )

    scored = llm.generate(
        [document(story) for story in stories],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    logprobs = [one.logprob for output in scored for one in prompt_token_logprobs(output)]
    return {
        "recall": right.total() / len(asked),
        "recall_by_kind": {kind: (right[kind], count) for kind, count in Counter(kinds).most_common()},
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "grammar_perplexity": math.exp(-sum(story.logprob for story in stories) / len(logprobs)),
    }


def sample_stories(llm: Any, num_stories: int, temperature: float = 0.8) -> dict[str, tuple[int, int]]:
    """(right, sampled) for each kind of story, if the model continues titles that are not in the training data.

    A story is right if the grammar could have written all of it: names, things, places, sums, the answers at its end,
    and every other word. One that does not end within `MAX_SAMPLED_TOKENS` is wrong. The seeds are 0, 1, 2, ...
    """
    from paged_infer.params import SamplingParams

    titles = [tell(FIRST_EVALUATION_SEED + i).text.split("\n")[0] for i in range(num_stories)]
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=MAX_SAMPLED_TOKENS) for i in range(num_stories)
    ]
    outputs = llm.generate([END + title for title in titles], params, use_tqdm=False)
    right, sampled = Counter[str](), Counter[str]()
    for title, output in zip(titles, outputs, strict=True):
        kind = title.removeprefix("A ").partition(" about ")[0]
        sampled[kind] += 1
        right[kind] += is_right(title + output.outputs[0].text)
    return {kind: (right[kind], sampled[kind]) for kind in KINDS if sampled[kind]}


def is_right(text: str) -> bool:
    """Whether the grammar could have written this whole document."""
    try:
        read(text)
    except ValueError:
        return False
    return True
