"""The checks of a request before it is queued: the first two of four gates. Then its sequences are made.

1. max_model_len           a rule      the prompt must leave room for one token; max_tokens is clamped to what is left
2. the pool's size         physics     blocks for its longest possible life must exist at all
3. max_num_batched_tokens  flow        } checked later, step by step, by the scheduler
4. max_num_seqs            crowd       }
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.beam_search import num_candidates
from paged_infer.control.blocks.hashing import root_hash
from paged_infer.control.blocks.manager import Allocation, BlockManager
from paged_infer.control.guided.grammar import Matcher
from paged_infer.control.policies import Policy
from paged_infer.control.request import Request
from paged_infer.control.sequence import Sequence
from paged_infer.params import BeamSearchParams, SamplingParams

MAX_NUM_SAMPLES = 16_384  # per request; vLLM's VLLM_MAX_N_SEQUENCES


class ContextLengthError(ValueError):
    """The prompt leaves no room for an answer. A separate class, because servers report it with a separate code."""


def truncated(prompt_token_ids: ReadOnlyList[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The prompt's last ``truncate_prompt_tokens`` tokens."""
    keep = params.truncate_prompt_tokens
    if keep is None:
        return list(prompt_token_ids)
    return list(prompt_token_ids[-(max_model_len - 1 if keep == -1 else keep) :])


def check_num_characters(num_characters: int, max_token_characters: int | None, max_model_len: int) -> None:
    """Refuse a text before tokenization if it is too long for the context, whatever its tokens.

    Args:
        max_token_characters: the most characters that one token can stand for; None if there is no bound.

    Raises:
        ContextLengthError: the text is too long; the message names the length and the limit.
    """
    if max_token_characters is not None and num_characters > max_token_characters * (max_model_len - 1):
        raise ContextLengthError(
            f"the prompt has {num_characters} characters: too long for max_model_len={max_model_len} tokens of at most "
            f"{max_token_characters} characters each"
        )


def check_request(
    prompt_token_ids: ReadOnlyList[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    max_num_seqs: int,
    manager: BlockManager,
    eos_token_ids: Collection[int] = (),
) -> None:
    """Law 5: refuse a request that could not be served, with the value and the limit in the message.

    Raises:
        ValueError: the prompt is empty, too long or holds unknown tokens; the parameters name unknown tokens, ask for
            more logprobs than there are tokens, ask for too many samples, or leave no token to sample before
            ``min_tokens``; or the pool could not hold the request even if it ran alone.
    """
    num_prompt = len(prompt_token_ids)
    if not num_prompt:
        raise ValueError("the prompt is empty (0 tokens): at least 1 is needed")
    for token_id in prompt_token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(f"prompt token id {token_id!r} is not an integer in the vocabulary [0, {vocab_size})")
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in getattr(params, name):
            if token_id >= vocab_size:
                raise ValueError(f"{name}: token id {token_id} is outside [0, {vocab_size})")
    _check_end_tokens(params, eos_token_ids, vocab_size)
    for name, number in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if number is not None and number > vocab_size:
            raise ValueError(f"{name}={number} exceeds the vocabulary's {vocab_size} tokens")
    if num_prompt >= max_model_len:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens: it must be shorter than max_model_len={max_model_len}"
        )
    if params.n > MAX_NUM_SAMPLES:
        raise ValueError(f"n={params.n}: must be at most {MAX_NUM_SAMPLES}")
    # The last token is sampled but never stored. In the worst case the samples or beams that run at once share nothing.
    longest = max_model_len if params.max_tokens is None else min(num_prompt + params.max_tokens, max_model_len)
    num_at_once = min(params.n, max_num_seqs)
    needed = num_at_once * manager.blocks_for(longest - 1)
    if manager.can_allocate(needed * manager.block_size) is Allocation.NEVER:
        raise ValueError(
            f"{num_at_once} sample(s) or beam(s) of {num_prompt} prompt and up to {longest - num_prompt} output "
            f"tokens need {needed} blocks of {manager.block_size}: the pool has num_blocks={manager.pool.num_blocks}"
        )


def _check_end_tokens(params: SamplingParams, eos_token_ids: Collection[int], vocab_size: int) -> None:
    """End tokens are masked before ``min_tokens``, so the vocabulary must have others."""
    if not params.min_tokens:
        return
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    if len(ends) >= vocab_size and ends.issuperset(range(vocab_size)):
        raise ValueError(
            f"min_tokens={params.min_tokens}: stop_token_ids and the end-of-sequence tokens cover all {vocab_size} "
            "tokens of the vocabulary, so no token could be sampled before min_tokens"
        )


def check_beams(params: BeamSearchParams, num_end_tokens: int, *, vocab_size: int, max_num_seqs: int) -> None:
    """Check a beam search, beyond ``check_request`` of its ``limits``.

    Raises:
        ValueError: its beams could not all run at once, or it ranks more tokens than the vocabulary has.
    """
    if params.beam_width > max_num_seqs:
        raise ValueError(f"beam_width={params.beam_width} beams cannot run at once: max_num_seqs={max_num_seqs}")
    needed = num_candidates(params.beam_width, range(num_end_tokens))
    if needed > vocab_size:
        raise ValueError(
            f"beam_width={params.beam_width} with {num_end_tokens} end token(s) ranks {needed} tokens per step: "
            f"the vocabulary has {vocab_size}"
        )


def check_budget(policy: Policy, max_num_batched_tokens: int, max_model_len: int) -> None:
    """Raises ValueError if a policy that does not chunk prompts could admit one that no step has the budget for."""
    if not policy.chunks_prompts and max_num_batched_tokens < max_model_len:
        raise ValueError(
            f"max_num_batched_tokens={max_num_batched_tokens} is less than max_model_len={max_model_len}, and "
            f"{type(policy).__name__} does not split prompts into chunks"
        )


def add_sequences(
    request: Request,
    first_sequence_id: int,
    seed: int,
    max_model_len: int,
    eos_token_ids: ReadOnlyList[int],
    new_matcher: Callable[[], Matcher | None] = lambda: None,
) -> None:
    """Make the request's sequences, one for each sample or beam, each with its own copy of the prompt's tokens.

    ``new_matcher`` gives each its place in its grammar and reasoning, if there are any: at the beginning.
    """
    num_prompt = len(request.prompt_token_ids)
    root = root_hash(request.cache_salt)
    params = request.params
    wanted = max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
    request.sequences += [
        Sequence(
            sequence_id=first_sequence_id + index,
            request_id=request.request_id,
            sample_index=index,
            params=params,
            seed=seed,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=num_prompt,
            max_total_tokens=min(wanted, max_model_len),
            eos_token_ids=frozenset(eos_token_ids),
            arrival_time_s=request.arrival_time_s,
            priority=request.priority,
            cache_root=root,
            siblings=request.sequences,
            matcher=new_matcher(),
            is_beam=request.beam_params is not None,
            num_common_tokens=num_prompt if params.n > 1 else 0,
        )
        for index in range(params.n)
    ]
