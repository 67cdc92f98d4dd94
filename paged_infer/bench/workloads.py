"""What the benches run: prompts, and how many tokens to generate for each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice

from paged_infer.llm import LLM
from paged_infer.params import SamplingParams
from paged_infer.storyteller.stories.grammar import tell
from paged_infer.storyteller.training.batches import FIRST_EVALUATION_SEED

OPENINGS = (
    "Once upon a time",
    "The house stood at the end of the road, and nobody had",
    "To keep a cache is to remember what was computed, so that",
    "In the morning they counted the boats. There were seven, and",
    "A list of things to take along:",
    "She opened the letter, read it twice, and then",
    "The reason why the sky is blue",
    "def fibonacci(n):",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with the same way to sample, each with its own number of tokens to generate.

    ``texts``: what a user says in a chat; ``prompts`` are these in the model's chat template. Empty: no chats.
    """

    name: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    seed: int
    texts: list[str] = field(default_factory=list)

    def sample(self, num_requests: int, max_tokens: int) -> Workload:
        """Its first requests, greedy and cut short: the systems' tokens for them can be compared."""
        params = [
            replace(one, temperature=0, max_tokens=min(max_tokens, one.max_tokens or max_tokens))
            for one in self.params[:num_requests]
        ]
        few = f"the first {len(params)}, greedy"
        return Workload(few, self.prompts[:num_requests], params, self.seed, self.texts[:num_requests])

    def bounded(self, thinking_token_budget: int | None) -> Workload:
        """The same with at most so many tokens of reasoning; None: no limit."""
        if thinking_token_budget is None:
            return self
        params = [replace(one, thinking_token_budget=thinking_token_budget) for one in self.params]
        return replace(self, name=f"{self.name}, {thinking_token_budget} of reasoning", params=params)

    def as_chats(self, llm: LLM) -> Workload:
        """The text of each prompt as a user's message: a question, which a storyteller's chat template looks for.

        Raises:
            ValueError: the model has no tokenizer, or no chat template.
        """
        tokenizer = llm.get_tokenizer()
        texts = [f"{tokenizer.decode(prompt)}?" for prompt in self.prompts]
        prompts = [llm.chat_prompt([user_message(text)]) for text in texts]
        return replace(self, name=f"{self.name}, as chats", prompts=prompts, texts=texts)

    def warm_ups(self) -> list[Workload]:
        """Short workloads with every kind of step of this one. Run before it is timed, they compile the kernels that it
        selects, and load those of libraries.

        The first has all prompts at once, each with two tokens to generate: the same chunks of prompts. Then comes one
        request alone for each power of two below the longest sequence, and one for that length: the longest row of a
        step decides on the tiles of a chunk (``prefill_tiles``) and whether a decode can be split (``split_bounds``).
        """
        few = [replace(one, max_tokens=min(2, one.max_tokens or 2)) for one in self.params]
        longest = max(len(p) + (one.max_tokens or 0) for p, one in zip(self.prompts, self.params, strict=True))
        longest = max(1, longest - 2)
        lengths = [*(2**n for n in range(4, longest.bit_length()) if 2**n < longest), longest]
        token_ids = list(islice(cycle(chain.from_iterable(self.prompts)), longest))
        alone = replace(self.params[0], max_tokens=2)
        return [
            Workload("all prompts, two tokens each", self.prompts, few, self.seed),
            *(Workload(f"{n} tokens in, 2 out", [token_ids[:n]], [alone], self.seed) for n in lengths),
        ]


def user_message(text: str) -> dict[str, str]:
    """A conversation's only message."""
    return {"role": "user", "content": text}


def nano_vllm_requests(
    vocab_size: int, num_requests: int = 256, scale: float = 1.0, temperature: float = 0.6, seed: int = 0
) -> Workload:
    """The workload of nano-vLLM's bench.py: random ids, prompts and outputs uniform 100..1024, no end token.

    At full size and seed 0 its lengths are those of bench.py (133,966 output tokens). ``scale`` multiplies the
    bounds of the lengths; ids beyond a smaller vocabulary are folded into it.
    """
    shortest, longest = max(1, round(100 * scale)), max(1, round(1024 * scale))
    rng = random.Random(seed)
    prompts = [
        [rng.randint(0, 10_000) % vocab_size for _ in range(rng.randint(shortest, longest))]
        for _ in range(num_requests)
    ]
    params = [
        SamplingParams(temperature=temperature, max_tokens=rng.randint(shortest, longest), ignore_eos=True)
        for _ in range(num_requests)
    ]
    name = f"{num_requests} requests, {shortest}..{longest} tokens in and out, temperature {temperature:g}"
    return Workload(name, prompts, params, seed)


def one_request(vocab_size: int, num_prompt: int, num_output: int, seed: int) -> Workload:
    """Random ids, greedy, no end token."""
    rng = random.Random(seed)
    prompt = [rng.randrange(vocab_size) for _ in range(num_prompt)]
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    return Workload(f"one request, {num_prompt} tokens in, {num_output} out", [prompt], [params], seed)


def random_lengths(llm: LLM, num_requests: int, shortest: int, longest: int, seed: int) -> Workload:
    """Random token ids; prompt and output lengths each uniform in [shortest, longest]; end tokens are ignored."""
    return random_ids(llm.engine.model_config.vocab_size, num_requests, shortest, longest, seed)


def random_ids(vocab_size: int, num_requests: int, shortest: int, longest: int, seed: int) -> Workload:
    """``random_lengths`` for a vocabulary: ids below ``vocab_size``."""
    if shortest > longest:
        raise ValueError(f"shortest={shortest}: must be at most longest={longest}")
    rng = random.Random(seed)
    lengths = [(rng.randint(shortest, longest), rng.randint(shortest, longest)) for _ in range(num_requests)]
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in lengths]
    params = [SamplingParams(temperature=0, max_tokens=output, ignore_eos=True) for _, output in lengths]
    return Workload(f"{num_requests} requests, {shortest}..{longest} tokens in and out", prompts, params, seed)


def random_words(num_requests: int, shortest: int, longest: int, seed: int) -> Workload:
    """``random_ids`` as chats with a model whose tokenizer is not known: prompts are of so many words of ``OPENINGS``.

    ``prompts`` have the numbers of the words.
    """
    words = sorted({word for text in OPENINGS for word in text.split()})
    drawn = random_ids(len(words), num_requests, shortest, longest, seed)
    texts = [" ".join(words[number] for number in prompt) for prompt in drawn.prompts]
    return replace(drawn, name=f"{num_requests} chats, {shortest}..{longest} words in and tokens out", texts=texts)


def story_beginnings(llm: LLM, num_requests: int, max_tokens: int, seed: int) -> Workload:
    """Beginnings of texts, cut at varied lengths; each continuation ends by itself or at a limit of its own.

    Limits are uniform in [max_tokens / 8, max_tokens].
    The storyteller gets the beginnings of stories that it has not seen, another model English sentences (or random
    ids where it has no tokenizer).
    """
    rng = random.Random(seed)
    if llm.tokenizer is None:
        vocab_size = llm.engine.model_config.vocab_size
        prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(4, 64))] for _ in range(num_requests)]
    elif llm.is_storyteller:
        first = FIRST_EVALUATION_SEED + seed * num_requests
        stories = [llm.tokenizer.encode(tell(first + index).text) for index in range(num_requests)]
        prompts = [story[: min(rng.randint(8, 96), len(story) // 2)] for story in stories]
    else:
        texts = [OPENINGS[index % len(OPENINGS)] for index in range(num_requests)]
        prompts = [llm.tokenizer.encode(text)[: rng.randint(3, 64)] for text in texts]
    limits = [rng.randint(max(1, max_tokens // 8), max_tokens) for _ in range(num_requests)]
    params = [SamplingParams(temperature=0, max_tokens=limit) for limit in limits]
    return Workload(f"{num_requests} beginnings, up to {max_tokens} tokens to follow", prompts, params, seed)
