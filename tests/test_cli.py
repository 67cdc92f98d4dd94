"""The commands do what their help says, and answer bad input with one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from paged_infer import LLM, RequestOutput, SamplingParams, storyteller
from paged_infer.cli import app
from paged_infer.cli.chat import HELP
from paged_infer.cli_options import open_llm, with_option_groups
from paged_infer.config import EngineConfig


def run(*arguments: str, stdin: str = ""):
    return CliRunner().invoke(app, [*arguments], input=stdin)


def test_generate_prints_the_prompt_and_what_the_storyteller_says():
    result = run("generate", "Once upon a time", "--max-tokens", "12", "--temperature", "0")
    assert result.exit_code == 0, result.output
    said = LLM().generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert result.output == "Once upon a time" + said[0].outputs[0].text + "\n"


def test_generate_keeps_the_space_between_a_prompt_and_its_text(llama_checkpoint):
    options = ("--model", str(llama_checkpoint), "--temperature", "0", "--max-tokens", "3", "--num-blocks", "9")
    for prompts in (["Once"], ["Once", "Mia"]):
        result = run("generate", *prompts, *options)
        assert result.exit_code == 0, result.output
        assert all(f"{prompt} t" in result.output for prompt in prompts)


def test_generate_says_the_same_with_speculation():
    arguments = ("generate", "One morning", "--max-tokens", "40", "--temperature", "0.8")
    config = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1}'
    drafted = run(*arguments, "--speculative-config", config)
    assert drafted.exit_code == 0 and drafted.output == run(*arguments).output


@pytest.mark.parametrize(
    ("config", "said"), [("{", "is not valid JSON"), ('{"method": "ngram"}', "num_speculative_tokens missing")]
)
def test_a_speculative_config_that_cannot_be_used_is_one_line(config, said):
    result = run("generate", "Once", "--speculative-config", config)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_generate_is_the_same_for_the_same_seed_and_differs_for_another():
    arguments = ("generate", "One morning", "--max-tokens", "24", "--temperature", "1.5")
    first, again, other = (run(*arguments, "--seed", seed).output for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_continues_several_prompts_in_order():
    result = run("generate", "Mia", "Tom", "--max-tokens", "4", "--temperature", "0")
    assert result.exit_code == 0, result.output
    assert result.output.index("Mia") < result.output.index("Tom")


def test_chat_answers_every_line_and_remembers_the_story_until_told_otherwise():
    story = "Tell me a story about Mia and a red key."
    result = run("chat", stdin=f"{story}\nWhere is the key?\n/new\n{story}\n")
    assert result.exit_code == 0, result.output
    first = result.output.split("\n", 1)[1]
    llm = LLM()
    messages = [{"role": "user", "content": story}]
    params = SamplingParams(temperature=0, max_tokens=512, stop="\nQ:")
    told = llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
    assert first.startswith(told)
    messages += [{"role": "assistant", "content": told}, {"role": "user", "content": "Where is the key?"}]
    answer = llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
    assert first == f"{told}\n{answer.strip()}\n{told}\n"
    assert "\n" not in answer.strip()


def test_chat_lists_its_commands_and_sends_none_of_them_to_the_model(text_checkpoint):
    options = ("--model", str(text_checkpoint), "--max-tokens", "3")
    alone = run("chat", *options, stdin="ab\n")
    result = run("chat", *options, stdin="/help\n/what\nab\n/quit\nab\n")
    assert alone.exit_code == result.exit_code == 0
    assert result.stdout == f"{HELP}\n{alone.stdout}", "nothing is read after /quit"
    assert result.stderr == "error: /what is not a command; /help lists them\n"
    assert all(re.search(rf"^{command} ", HELP, flags=re.MULTILINE) for command in ("/new", "/help", "/quit"))


def test_chat_reads_undecodable_bytes_as_replacement_characters(text_checkpoint):
    options = ("--model", str(text_checkpoint), "--max-tokens", "3", "--temperature", "0")
    result = CliRunner().invoke(app, ["chat", *options], input=b"a\xe9b\n")
    assert result.exit_code == 0, result.output
    assert result.output == run("chat", *options, stdin="a\ufffdb\n").output


def test_ctrl_c_stops_an_answer_and_not_the_chat(text_checkpoint, monkeypatch):
    """The second answer is stopped after two tokens, and is aborted; the third question comes after what it said."""
    asked, streams = [], LLM.stream
    made: list[LLM] = []

    def stream(llm: LLM, prompt: list[int], params: SamplingParams) -> Iterator[RequestOutput]:
        asked.append(llm.tokenizer.decode(prompt))
        made.append(llm)
        stop_after = 2 if len(asked) == 2 else params.max_tokens

        def growing():
            for number, output in enumerate(streams(llm, prompt, params), 1):
                yield output
                if number == stop_after:
                    raise KeyboardInterrupt

        return growing()

    monkeypatch.setattr(LLM, "stream", stream)
    options = ("--model", str(text_checkpoint), "--max-tokens", "5", "--temperature", "0")
    result = run("chat", *options, stdin="ab\ncd\nef\n")
    assert result.exit_code == 0 and len(asked) == 3, result.output
    assert asked[2].startswith(asked[1]) and "ef" in asked[2]
    assert not made[-1].engine.has_unfinished_requests
    made[-1].check_integrity()


@pytest.fixture
def failing_model(monkeypatch, text_checkpoint) -> tuple[str, ...]:
    """Options of a model that fails on "q": the embedding of its tokens is NaN."""
    open_engine = LLM.__init__

    def open_poisoned(llm: LLM, *arguments: Any, **options: Any) -> None:
        open_engine(llm, *arguments, **options)
        embedding, fatal = (
            llm.engine.decoder.embedding,
            torch.tensor(llm.tokenizer.encode("q") + llm.tokenizer.encode(" q")),
        )
        look_up = embedding.forward
        embedding.forward = lambda ids: look_up(ids).masked_fill(torch.isin(ids, fatal)[:, None], torch.nan)

    monkeypatch.setattr(LLM, "__init__", open_poisoned)
    return ("--model", str(text_checkpoint), "--max-tokens", "4", "--temperature", "0")


def test_generate_says_why_a_prompt_failed_and_exits_with_status_1(failing_model):
    result = run("generate", "q", "--num-blocks", "9", *failing_model)
    assert result.exit_code == 1 and result.stdout == "q\n"
    assert result.stderr.startswith("error: prompt 0: request '0' failed after")
    assert result.stderr.count("\n") == 1


def test_generate_shows_the_prompts_that_did_not_fail(failing_model):
    options = ("--num-blocks", "9", *failing_model)
    alone = run("generate", "ab", *options)
    result = run("generate", "ab", "q", *options)
    assert alone.exit_code == 0 and result.exit_code == 1
    assert result.stdout == f"{alone.stdout}\nq\n\n"
    assert "error: prompt 1: request '1' failed after" in result.stderr


def test_chat_says_why_an_answer_failed_and_goes_on_without_the_question(failing_model):
    result = run("chat", *failing_model, stdin="q\nab\n")
    alone = run("chat", *failing_model, stdin="ab\n")
    assert result.exit_code == alone.exit_code == 0
    assert result.stdout == f"\n{alone.stdout}" and alone.stderr == ""
    assert result.stderr.startswith("error: request '0' failed after") and result.stderr.count("\n") == 1


def test_info_counts_the_sampled_stories_that_the_grammar_could_have_written():
    result = run("info", "--stories", "0", "--sampled", "3", "--num-blocks", "400")
    assert result.exit_code == 0, result.output
    found = storyteller.sample_stories(LLM(num_blocks=400), 3)
    said = re.search(r"right in every word: (\d) of 3 sampled stories: (.*)", " ".join(result.output.split()))
    assert int(said[1]) == sum(right for right, _ in found.values())
    assert sum(asked for _, asked in found.values()) == 3 and all(kind in said[2] for kind in found)


def test_info_shows_the_formula_with_its_numbers():
    result = run("info", "--stories", "0", "--num-blocks", "100", "--block-size", "8")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "2 x layers x kv_heads x head_dim x bytes = 2 x 6 x 2 x 32 x 4 = 3,072" in words
    assert "100 blocks = 800 tokens" in words and "quantization" not in words


def test_info_shows_what_is_quantised_and_its_bytes():
    """24 matrices of 2,801,664 weights in all: a byte each, and 4 bytes for the scale of each row."""
    result = run("info", "--stories", "0", "--num-blocks", "100", "--quantization", "w8a8")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "339,840 parameters x 4 bytes + 2,801,664 quantised in 2.7 MiB" in words
    assert "w8a8, while loading; linear layers: 24 of 8 bits, one scale per row, activations quantised to int8" in words


def test_info_counts_the_scales_of_a_cache_of_8_bits():
    result = run("info", "--stories", "0", "--num-blocks", "100", "--block-size", "8", "--kv-cache-dtype", "fp8")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "fp8: 2 x layers x kv_heads x (head_dim + 2 of its scale) = 2 x 6 x 2 x (32 + 2) = 816" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--model", "no/such-model"), "no/such-model"),
        (("generate", "x", "--model", "./no/such/folder"), "neither a folder, nor a GGUF file, nor a hub id"),
        (("generate", "x", "--top-p", "0"), "top_p=0"),
        (("generate", "x", "--attention-backend", "abacus"), "abacus"),
        (("generate", ""), "the prompt is empty"),
        (("info", "--block-size", "0"), "block_size=0"),
        (("compare", "--device", "abacus"), "abacus"),
        (("bench", "ladder", "--dtype", "int3"), "int3"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.strip().count("\n") == 0
    assert "Traceback" not in result.output


def test_a_group_of_options_is_an_option_for_each_of_its_fields(text_llm):
    """A command takes all that ``EngineConfig`` has, with its defaults, and an engine gets what was said."""
    made = {}

    @with_option_groups
    def command(engine: EngineConfig, size: int = 1) -> None:
        made["size"], made["engine"] = size, engine

    small = typer.Typer()
    small.command()(command)
    result = CliRunner().invoke(small, ["--size", "3", "--block-size", "5", "--attention-backend", "torch"])
    assert result.exit_code == 0, result.output
    assert made["size"] == 3
    assert made["engine"] == EngineConfig(block_size=5, attention_backend="torch")
    llm = open_llm(str(text_llm.folder), **made["engine"].options)
    assert llm.engine.memory.block_size == 5
