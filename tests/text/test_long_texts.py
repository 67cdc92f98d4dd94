"""Texts that cannot fit are refused before they are tokenized; long ones that might fit do not hold up the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from paged_infer import AsyncLLM, SamplingParams
from paged_infer.async_llm import EngineDeadError, QueueFullError
from paged_infer.control.admission import ContextLengthError
from paged_infer.text.tokenizer import Tokenizer

SHORT = SamplingParams(temperature=0, max_tokens=2)
CUT = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=5)


class Held(Tokenizer):
    """Blocks on texts of more than 4,096 characters until released; records what it was asked for."""

    released = threading.Event()
    began = threading.Event()
    asked: ClassVar[list[int]] = []

    def encode(self, text: str) -> list[int]:
        self.asked.append(len(text))
        if len(text) > 4096:
            self.began.set()
            self.released.wait()
        return super().encode(text)


def played(scenario: Callable[[AsyncLLM], Any], folder: Any) -> None:
    async def main() -> None:
        async with AsyncLLM(folder, num_blocks=64, device="cpu") as engine:
            tokenizer = engine.tokenizer
            assert tokenizer is not None
            tokenizer.__class__ = Held
            Held.released, Held.began, Held.asked = threading.Event(), threading.Event(), []
            try:
                await scenario(engine)
            finally:
                Held.released.set()

    asyncio.run(asyncio.wait_for(main(), 120))


async def last(engine: AsyncLLM, *arguments: Any) -> Any:
    return [output async for output in engine.generate(*arguments)][-1]


@pytest.mark.parametrize("entry", ["submit", "chat"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(entry: str, text_checkpoint) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        text = "ab" * 500_000
        with pytest.raises(ContextLengthError, match=r"has 1000000 characters.*max_model_len=512"):
            if entry == "submit":
                await engine.submit(text, SHORT)
            else:
                await engine.chat_prompt([{"role": "user", "content": text}])
        assert Held.asked == []

    played(scenario, text_checkpoint)


def test_an_offline_text_that_cannot_fit_is_refused_before_it_is_tokenized(text_llm, monkeypatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("it was tokenized"))
    with pytest.raises(ValueError, match="prompt 1: the prompt has 1000000 characters"):
        text_llm.generate([[5], "ab" * 500_000], SHORT, use_tqdm=False)


def test_a_text_that_is_cut_is_never_too_long(text_checkpoint) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        Held.released.set()
        output = await last(engine, "ab " * 20_000, CUT)
        assert len(output.prompt_token_ids) == 5
        prompt = await engine.chat_prompt([{"role": "user", "content": "ab " * 20_000}], truncates=True)
        assert len(prompt) > 512

    played(scenario, text_checkpoint)


def test_long_texts_let_shorter_ones_pass_and_are_bounded(text_checkpoint) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        engine._tokenizing._max_num_characters = 120_000
        long = [asyncio.create_task(last(engine, "ab " * 10_000, CUT)) for _ in range(3)]
        await asyncio.to_thread(Held.began.wait)
        while engine._tokenizing._num_characters < 90_000:
            await asyncio.sleep(0)
        shorter = asyncio.create_task(last(engine, "ab " * 1500, CUT))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="94500 characters are waiting"):
            await last(engine, "ab " * 10_000, CUT)
        gone = long.pop()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine._tokenizing._num_characters == 64_500
        Held.released.set()
        for one in (*long, shorter):
            assert len((await one).prompt_token_ids) == 5
        assert Held.asked == [30_000, 4_500, 30_000]

    played(scenario, text_checkpoint)


def test_a_text_that_comes_after_the_end_is_no_failure_of_the_queue(text_checkpoint) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        await engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await last(engine, "ab " * 1500, CUT)

    played(scenario, text_checkpoint)
