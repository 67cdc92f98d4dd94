"""What passes between the engine and an executor is plain data that survives a pickle."""

from __future__ import annotations

import pickle

from paged_infer.control.step import BlockTransfers, SamplingRow, ScheduledSequence, ScheduledStep, StepResult, TopKRow
from paged_infer.outputs import Logprob
from paged_infer.params import SamplingParams


def test_a_step_and_its_result_equal_their_pickles() -> None:
    row = SamplingRow(SamplingParams(temperature=0.5, logprobs=1), 7, 0, 4, 1, (1,), (5, 6), (8,))
    sequences = [
        ScheduledSequence(0, [5, 6, 8], 0, (3,), row, [(2, row)], num_prompt_logprobs=1, next_prompt_token_ids=[6]),
        ScheduledSequence(1, [9, -1], 4, (3, 4), TopKRow(4, (1,)), num_drafts=1),
    ]
    step = ScheduledStep(1, sequences, BlockTransfers([(0, 1)], [(1, 2)], [(2, 3)]), resume_at_s=0.5)
    logprobs = {8: Logprob(-0.5, 1, "word")}
    result = StepResult({0: 8}, {1: [9]}, {0: [logprobs]}, {0: (1, [logprobs])}, {1: [(9, -0.25)]}, {2: "NaN"})
    for one in (step, result):
        assert pickle.loads(pickle.dumps(one)) == one
