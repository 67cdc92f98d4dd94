"""How well a model has learned the grammar: recall of facts, and perplexity against the best possible."""

import math
from collections import Counter
from typing import Any

from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED, Story, ask, tell


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
    """Its first two words, such as "How many"."""
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
