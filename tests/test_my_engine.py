"""The engine that the course builds: each of its states gives the package's tokens, and its pool keeps count."""

from __future__ import annotations

import ast
import random
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from my_engine import Decoder, Engine, SamplingParams, generate_cached, generate_naive, lent, states
from my_engine.attention import attention, flash_attention
from my_engine.paged import BlockManager

from paged_infer import LLM, storyteller
from paged_infer import SamplingParams as PackageParams
from paged_infer.control.blocks.manager import BlockManager as PackageManager
from paged_infer.kernels.attention_backends import attention_backend
from paged_infer.storyteller import tell

FOLDER = Path(__file__).parent.parent / "notebooks"
CHAPTERS = range(1, states.LAST + 1)
BUILDING = (1, 2, 3, 4, 7, 8, 9, 10, 11)  # chapters that add to the engine
GREEDY = {"temperature": 0.0, "max_tokens": 14}
SEEDED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7, "max_tokens": 10}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return lent.package()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(storyteller.PATH)


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    """Beginnings of stories, from 1 token to 60."""
    return [llm.tokenizer.encode(tell(seed).text)[:length] for seed, length in enumerate((1, 60, 17, 32, 5, 48, 16))]


def package_tokens(llm: LLM, prompts, params) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [sample.token_ids for output in outputs for sample in output.outputs]


def tokens(sequences) -> list[list[int]]:
    return [sequence.output_token_ids for sequence in sequences]


def assert_all_free(engine: Engine) -> None:
    manager = engine.scheduler.manager
    assert sorted(manager.free_blocks) == list(range(manager.num_blocks))
    assert not any(manager.ref_count) and not manager.copies and not engine.scheduler.running


class TestStates:
    @pytest.mark.parametrize("chapter", BUILDING)
    def test_each_gives_the_tokens_of_the_package(self, chapter, llm, capsys):
        states.run(chapter, llm=llm, **GREEDY)
        prompts, options = states.PROMPTS[:2], {**SEEDED, "n": 2}
        states.run(chapter, prompts, llm, **options)
        assert capsys.readouterr().out.count("equal to the package's") == 2

    def test_the_last_state_is_the_code_that_is_shipped(self):
        for name in states.FILES:
            shipped = (FOLDER / "my_engine" / name).read_text()
            assert ast.dump(ast.parse(states.source(name, states.LAST))) == ast.dump(ast.parse(shipped))

    def test_a_state_holds_those_before_it(self):
        for name in states.FILES:
            for chapter in CHAPTERS[1:]:
                after = iter(states.source(name, chapter).splitlines())
                assert all(line in after for line in states.source(name, chapter - 1).splitlines() if line)

    def test_only_these_chapters_add_something(self):
        adding = {written for name in states.FILES for _, written in states.state_lines(name, states.LAST)}
        assert adding == {*BUILDING}

    def test_a_state_may_be_shown_by_file_and_by_part(self, capsys):
        states.show("paged.py", 9, "BlockManager.take")
        assert capsys.readouterr().out.splitlines() == [
            "      def take(self):",
            "          block = self.free_blocks.pop()  # the one that was freed last",
            "+         self.ref_count[block] = 1",
            "+         self.block_of.pop(self.hash_of.pop(block, None), None)  # evicted from the prefix cache",
            "          return block",
        ]
        states.show("sampler.py", 1)
        assert all(line.startswith("+") for line in capsys.readouterr().out.splitlines() if line)

    @pytest.mark.parametrize("name", ("notebooks.my_engine", "my_engine"))
    def test_the_command_runs_from_the_root_and_from_the_notebooks(self, name, llm, monkeypatch, capsys):
        monkeypatch.chdir(FOLDER.parent if name.startswith("notebooks") else FOLDER)
        monkeypatch.syspath_prepend(".")
        monkeypatch.setattr("sys.argv", ["my_engine", "--chapter", "8", "--diff"])
        runpy.run_module(name, run_name="__main__")
        printed = capsys.readouterr().out
        assert "+class BlockManager:" in printed and "equal to the package's" in printed


class TestMarks:
    @pytest.mark.parametrize("name", states.FILES)
    def test_they_are_well_formed(self, name):
        assert list(states.marked_lines((FOLDER / "my_engine" / name).read_text()))

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("x = 1", "invalid literal"),
            ("# CHAPTER 08\nx = 1  # NEW 8", "line 2 is no mark"),
            ("# CHAPTER 08\n# NEW 09\nx = 1", "END 09 is missing"),
            ("# CHAPTER 08\nx = 1  # NEW 07", "line 2 is out of place in chapter 08"),
            ("# CHAPTER 08\n# END 09", "line 2 is out of place"),
            ("# CHAPTER 08\n# NEW 09\nx = 1  # NEW 10\n# END 09", "line 3 is out of place in chapter 09"),
            ("# CHAPTER 08\n# NEW 09\nx = 1\n# END 10", "line 4 is out of place in chapter 09"),
        ],
    )
    def test_others_are_refused_by_line(self, text, fault):
        with pytest.raises(ValueError, match=fault):
            list(states.marked_lines(text))


class TestSize:
    """An engine to read in one sitting. Blank lines and marks are not counted."""

    def test_it_has_at_most_400_lines_of_code_and_450_with_docstrings(self):
        texts = [states.source(name, states.LAST) for name in states.FILES]
        lines = sum(bool(line.strip()) for text in texts for line in text.splitlines())
        nodes = (node for text in texts for node in ast.walk(ast.parse(text)))
        documented = [
            n.body[0]
            for n in nodes
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
            if ast.get_docstring(n)
        ]
        assert lines <= 450
        assert lines - sum(n.end_lineno - n.lineno + 1 for n in documented) <= 400

    def test_its_lines_fit_a_cell(self):
        lines = [line for name in states.FILES for line in (FOLDER / "my_engine" / name).read_text().splitlines()]
        assert max(map(len, lines)) <= 100

    def test_the_tool_has_at_most_150_lines(self):
        lines = (FOLDER / "my_engine" / "states.py").read_text().splitlines()
        assert sum(bool(line.strip()) for line in lines) <= 150


class TestAttention:
    def test_flash_attention_is_attention(self):
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 70, 2, 8), torch.randn(2, 70, 2, 8)
        positions = torch.tensor([[0, 1, 31, 32, 69], [5, 6, 7, 8, 9]])
        for tile in (1, 7, 32, 100):
            found = flash_attention(q, k, v, positions, tile)
            torch.testing.assert_close(found, attention(q, k, v, positions))

    def test_it_is_that_of_torch(self):
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 9, 6, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(attention(q, k, v, torch.arange(9).expand(2, 9)), expected.transpose(1, 2))


class TestEngine:
    def test_every_rung_gives_the_tokens_of_the_package(self, llm, decoder, prompts):
        expected = package_tokens(llm, prompts, PackageParams(**GREEDY))
        assert tokens(generate_naive(decoder, prompts[:3], **GREEDY)) == expected[:3]
        assert tokens(generate_cached(decoder, prompts, **GREEDY)) == expected
        assert tokens(Engine(storyteller.PATH).generate(prompts, **GREEDY)) == expected

    def test_requests_may_have_their_own_parameters(self, llm, prompts):
        options = [
            {**SEEDED, "seed": i, "max_tokens": 3 + 4 * i, "temperature": i % 3 / 2} for i in range(len(prompts))
        ]
        engine = Engine(storyteller.PATH)
        found = engine.generate(prompts, [SamplingParams(**one) for one in options])
        assert tokens(found) == package_tokens(llm, prompts, [PackageParams(**one) for one in options])
        assert_all_free(engine)

    def test_a_small_pool_preempts_and_changes_no_token(self, llm, prompts):
        engine = Engine(storyteller.PATH, num_blocks=22, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
        for options in (GREEDY, {**SEEDED, "n": 2}):
            found = engine.generate(prompts, **options)
            assert tokens(found) == package_tokens(llm, prompts, PackageParams(**options))
            assert_all_free(engine)
        assert engine.scheduler.num_preemptions > 3

    def test_no_step_exceeds_its_limits_and_none_that_runs_is_left_out(self, prompts):
        engine = Engine(storyteller.PATH, max_num_seqs=3, max_num_batched_tokens=8)
        scheduler = engine.scheduler
        sequences = engine.add_requests(prompts, **GREEDY)
        plan, plans = scheduler.schedule, []
        scheduler.schedule = lambda: plans.append(plan()) or plans[-1]
        while not all(sequence.finish_reason for sequence in sequences):
            running = list(scheduler.running)
            engine.step()
            planned = [sequence for sequence, _ in plans[-1]]
            assert all(sequence in planned for sequence in running)
            assert len(planned) <= 3 and sum(num_new for _, num_new in plans[-1]) <= 8
            assert all(num_new > 0 for _, num_new in plans[-1])

    def test_sequences_stay_in_their_order_when_some_are_preempted(self, prompts):
        engine = Engine(storyteller.PATH, num_blocks=20, block_size=4, max_num_batched_tokens=16)
        sequences = engine.add_requests(prompts, **GREEDY)
        while not all(sequence.finish_reason for sequence in sequences):
            engine.step()
            queued = [*engine.scheduler.running, *engine.scheduler.waiting]
            assert queued == [sequence for sequence in sequences if not sequence.finish_reason]
        assert engine.scheduler.num_preemptions > 0

    def test_the_state_of_chapter_8_deadlocks_where_chapter_10_preempts(self, llm):
        prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]  # two blocks each, and a third one each later
        small = {"num_blocks": 5, "block_size": 4}
        options = {"max_tokens": 12, "ignore_eos": True}
        early = states.load(8).Engine(storyteller.PATH, **small)
        with pytest.raises(RuntimeError, match="waits for blocks"):
            early.generate(prompts, **options)
        expected = package_tokens(llm, prompts, PackageParams(temperature=0, **options))
        assert tokens(Engine(storyteller.PATH, **small).generate(prompts, **options)) == expected

    def test_a_known_beginning_is_not_computed_again(self, llm, prompts):
        engine = Engine(storyteller.PATH)
        prefix = prompts[1][:40]
        expected = package_tokens(llm, [[*prefix, t] for t in (5, 6, 7)], PackageParams(**GREEDY))
        sequences = engine.add_requests([[*prefix, t] for t in (5, 6, 7)], **GREEDY)
        engine.step()
        first, second, third = (sequence.block_table for sequence in sequences)
        assert first[:2] == second[:2] == third[:2] and len({first[2], second[2], third[2]}) == 3
        again = engine.add_requests([[*prefix, 5]], **GREEDY)
        engine.step()
        assert again[0].block_table[:2] == first[:2]
        while not all(sequence.finish_reason for sequence in sequences + again):
            engine.step()
        assert tokens(sequences + again) == expected + expected[:1]
        assert_all_free(engine)

    def test_a_prompt_that_is_cached_as_a_whole_still_computes_its_last_token(self, prompts):
        engine = Engine(storyteller.PATH)
        whole = [prompt for prompt in prompts if len(prompt) % 16 == 0]
        first, again = (tokens(engine.generate(whole, **GREEDY)) for _ in range(2))
        assert len(whole) > 1 and first == again

    def test_samples_share_the_prompt_and_copy_before_they_write(self, llm, prompts):
        engine = Engine(storyteller.PATH)
        options = {**SEEDED, "n": 3, "ignore_eos": True}
        for prompt in (prompts[1], prompts[3]):  # the last block partly filled, and full
            sequences = engine.add_requests([prompt], **options)
            engine.step()
            engine.step()
            tables = [sequence.block_table for sequence in sequences]
            num_whole = (len(prompt) - 1) // 16
            assert all(table[:num_whole] == tables[0][:num_whole] for table in tables)
            assert len({table[num_whole] for table in tables}) == 3
            while not all(sequence.finish_reason for sequence in sequences):
                engine.step()
            assert tokens(sequences) == package_tokens(llm, [prompt], PackageParams(**options))
            assert_all_free(engine)

    def test_it_streams_while_others_run(self, llm):
        engine = Engine(storyteller.PATH)
        (other,) = engine.add_requests(["A story about Mia"], **GREEDY)
        pieces = list(engine.stream("Once upon a time", **GREEDY))
        expected = llm.generate(["Once upon a time"], PackageParams(**GREEDY), use_tqdm=False)[0].outputs[0].text
        assert "".join(pieces) == expected and len(pieces) == 14
        assert other.finish_reason == "length"

    def test_what_can_never_fit_is_refused_and_nothing_is_queued(self):
        engine = Engine(storyteller.PATH, num_blocks=4, block_size=4)
        for prompt, max_tokens, fault in (
            ([], 4, "need a prompt"),
            ([5], 1024, "at most 1024"),
            ([5] * 10, 8, "4 blocks"),
        ):
            with pytest.raises(ValueError, match=fault):
                engine.generate([[5], prompt], max_tokens=max_tokens)
        assert not engine.scheduler.waiting
        assert tokens(engine.generate([[5] * 10], max_tokens=7, ignore_eos=True))

    def test_the_backends_of_the_package_fit(self, llm, prompts):
        expected = package_tokens(llm, prompts, PackageParams(**GREEDY))
        for name in ("torch", "sdpa"):
            backend, _ = attention_backend(name, torch.device("cpu"))
            engine = Engine(storyteller.PATH, backend=backend, max_num_batched_tokens=32)
            assert tokens(engine.generate(prompts, **GREEDY)) == expected


class Held(SimpleNamespace):
    """A sequence as the manager sees it; equal to itself alone."""

    __eq__, __hash__ = object.__eq__, object.__hash__


class TestBlocks:
    """Random programs of what a scheduler does."""

    @settings(max_examples=40 * EFFORT)
    @given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(4, 16))
    def test_counts_equal_the_tables_that_hold_a_block(self, dice: random.Random, block_size, num_blocks):
        manager, running, written = BlockManager(num_blocks, block_size), [], {}
        for _ in range(40):
            self.act(manager, dice, running, written)
            held = Counter(block for s in running for block in s.block_table)
            assert manager.ref_count == [held[block] for block in range(num_blocks)]
            assert sorted(manager.free_blocks) == [block for block in range(num_blocks) if not held[block]]
            assert {h: b for b, h in manager.hash_of.items()} == manager.block_of
        for sequence in running:
            manager.free(sequence)
        assert len(manager.free_blocks) == num_blocks

    def test_free_blocks_are_taken_in_the_order_of_the_package(self):
        """Blank ones first, the one freed last before others; then cached ones, least recently used first."""
        mine, package = BlockManager(8, 2), PackageManager(8, 2)
        sequences = [
            Held(token_ids=[*ids], num_computed_tokens=0, block_table=[], block_hashes=[])
            for ids in (range(5), range(10, 13))
        ]
        for number, sequence in enumerate(sequences):
            num_tokens = len(sequence.token_ids)
            assert mine.allocate(sequence, num_tokens) and package.reserve(number, 0, num_tokens)
            package.publish(number, sequence.block_hashes, 0, num_tokens // 2)
        for number, sequence in enumerate(sequences):
            mine.free(sequence)
            package.free(number)
        taken = [mine.take() for _ in range(8)]
        assert taken == [package.pool.take() for _ in range(8)] == [4, 2, 5, 6, 7, 1, 0, 3]

    def act(self, manager, dice, running, written) -> None:
        """One step's worth for one sequence; ``written`` is what each slot holds: (all tokens up to it)."""
        size = manager.block_size
        if not running or dice.random() < 0.3:
            prompt = [dice.randrange(2) for _ in range(dice.randint(1, 10))]
            parent = dice.choice(running) if running and dice.random() < 0.5 else None
            if parent is not None:
                prompt = parent.token_ids[: parent.num_prompt_tokens]
            sequence = Held(
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                num_computed_tokens=0,
                block_table=[],
                block_hashes=[],
                parent=parent,
            )
            if not manager.share(sequence):
                return
        else:
            sequence = dice.choice(running)
            if dice.random() < 0.2:
                running.remove(sequence)
                manager.free(sequence)
                return
        if sequence.num_computed_tokens == len(sequence.token_ids):
            sequence.token_ids.append(dice.randrange(2))
        start = sequence.num_computed_tokens
        num_new = dice.randint(1, len(sequence.token_ids) - start)
        if not manager.allocate(sequence, num_new):
            if sequence not in running:
                manager.free(sequence)
            return
        for source, destination in manager.copies:
            for i in range(size):
                written[destination * size + i] = written.get(source * size + i)
        manager.copies.clear()
        for position in range(start, start + num_new):
            block = sequence.block_table[position // size]
            assert manager.ref_count[block] == 1, "a shared block is never written"
            written[block * size + position % size] = tuple(sequence.token_ids[: position + 1])
        sequence.num_computed_tokens += num_new
        if sequence not in running:
            running.append(sequence)
        for one in running:
            for position in range(one.num_computed_tokens):
                slot = one.block_table[position // size] * size + position % size
                assert written[slot] == tuple(one.token_ids[: position + 1])
