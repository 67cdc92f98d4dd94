"""Endless training rows: one document per row, in batches of similar length to keep padding small."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue
from threading import Thread

import torch
from tokenizers import Tokenizer

from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED, tell
from paged_infer.storyteller.training.drill import drill

CONTEXT = 1024


@dataclass(frozen=True)
class Mix:
    """Shares of the rows, the rest of which are stories, one per row; and the weights of their tokens in the loss.

    `packed` rows are several documents in a row of `CONTEXT` tokens, so that every position is trained.
    `headless` is the share of documents that begin without `<|endoftext|>`.
    """

    drills: float
    packed: float = 0.0
    most_facts: int = 5
    headless: float = 0.0
    answer_weight: float = 1.0
    drill_weight: float = 1.0  # of tokens of memory games outside answers, which cannot be predicted


@dataclass(frozen=True)
class Batch:
    """token_ids [B, S] and the weight of each position's prediction of the next token, weights [B, S - 1]."""

    token_ids: torch.Tensor
    weights: torch.Tensor


class Rows:
    """Token lists of documents, drawn by one seeded generator."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        [self.end] = tokenizer.encode(END).ids
        [self.newline] = tokenizer.encode("\n").ids
        self.answer: list[int] = tokenizer.encode("A:").ids

    def document(self, mix: Mix, plain_story: bool = False) -> tuple[list[int], bool]:
        """`<|endoftext|>`, a story or a memory game, and `<|endoftext|>`; and whether it is a memory game.

        Some begin without the first token, or without their first lines too, as the prompts of users do.
        """
        seed = self.random.randrange(FIRST_EVALUATION_SEED)
        is_drill = not plain_story and self.random.random() * (1.0 - mix.packed) < mix.drills
        text = drill(seed, mix.most_facts).text if is_drill else tell(seed).text
        if self.random.random() < mix.headless:
            text = text.split("\n", 0 if is_drill else self.random.randrange(3))[-1]
            return [*self.tokenizer.encode(text).ids, self.end], is_drill
        return [self.end, *self.tokenizer.encode(text).ids, self.end], is_drill

    def row(self, mix: Mix) -> tuple[list[int], list[float]]:
        """(token ids, weights) of a document, or of several that share their `<|endoftext|>`s, cut at `CONTEXT`."""
        if self.random.random() >= mix.packed:
            row, is_drill = self.document(mix)
            return row, self.weights(row, mix.answer_weight, mix.drill_weight if is_drill else 1.0)
        row, _ = self.document(mix, plain_story=True)
        while len(row) < CONTEXT:
            following, _ = self.document(mix, plain_story=True)
            row += following[following[0] == self.end :]
        row = row[:CONTEXT]
        return row, self.weights(row, mix.answer_weight, 1.0)

    def weights(self, row: list[int], answer_weight: float, other_weight: float) -> list[float]:
        """For each predicted token, `answer_weight` if it is part of an answer, else `other_weight`."""
        weights, in_answer = [other_weight] * (len(row) - 1), False
        for i in range(1, len(row) - 1):
            if row[i - 1 : i + 1] == self.answer:
                in_answer = True
            elif row[i] == self.newline:
                in_answer = False
            if in_answer:
                weights[i] = answer_weight
        return weights

    def batches(self, mix: Mix, tokens: int) -> list[Batch]:
        """Some batches of about `tokens` positions each, of rows of similar length, in random order."""
        num_rows = 128 if tokens < 4000 else 256  # enough for neighbours of similar length
        rows = sorted((self.row(mix) for _ in range(num_rows)), key=lambda row: len(row[0]))
        batches, group = [], list[tuple[list[int], list[float]]]()
        for row in rows:
            if group and (len(group) + 1) * len(row[0]) > tokens:
                batches.append(self.pad(group))
                group = []
            group.append(row)
        batches.append(self.pad(group))
        self.random.shuffle(batches)
        return batches

    def pad(self, rows: list[tuple[list[int], list[float]]]) -> Batch:
        """Rows, as `row` gives them, as one batch; shorter ones end in `<|endoftext|>`s that weigh nothing."""
        width = max(len(row) for row, _ in rows)
        token_ids = torch.full((len(rows), width), self.end)
        weights = torch.zeros(len(rows), width - 1)
        for i, (row, row_weights) in enumerate(rows):
            token_ids[i, : len(row)] = torch.tensor(row)
            weights[i, : len(row) - 1] = torch.tensor(row_weights)
        return Batch(token_ids, weights)


def stream(rows: Rows, phases: list[tuple[int, Mix]], tokens: int) -> Iterator[Batch]:
    """`steps` batches for each of `phases` (steps, mix), prepared in a thread."""
    queue: Queue[Batch] = Queue(maxsize=64)

    def write() -> None:
        for steps, mix in phases:
            left = steps
            while left > 0:
                for batch in rows.batches(mix, tokens)[:left]:
                    queue.put(batch)
                    left -= 1

    Thread(target=write, daemon=True).start()
    for _ in range(sum(steps for steps, _ in phases)):
        yield queue.get()
