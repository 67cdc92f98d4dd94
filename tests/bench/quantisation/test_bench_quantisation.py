"""bench quantisation: quality computed by hand, bits counted, invalid options refused, and the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_random_checkpoint, save_tokenizer
from typer.testing import CliRunner

from paged_infer import storyteller
from paged_infer.bench.peers.other_engines import PeerOptions
from paged_infer.bench.peers.processes import PROC
from paged_infer.bench.quantisation import engines, llama, quality
from paged_infer.bench.quantisation.cases import Case, read_cases, read_engines, read_scheme
from paged_infer.bench.quantisation.engines import Memory, peer_options, weigh, workloads
from paged_infer.bench.quantisation.quality import HeldOut, Quality, held_out_stories, measure, rounded_decoder
from paged_infer.bench.quantisation.report import QuantisationReport, print_report, quantisation_figure
from paged_infer.bench.side_by_side import turns
from paged_infer.bench.side_by_side.turns import PeerResult, TimedRun
from paged_infer.cli import app
from paged_infer.config import EngineOptions
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant.calibration import log_probs
from paged_infer.model.quant.scheme import Scheme
from paged_infer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_random_checkpoint("llama3", tmp_path_factory.mktemp("model"))
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, torch.float32, method_of=lambda name: DENSE)


def case(name: str, method: str = "rtn") -> Case:
    return Case(name, method, read_scheme(name, 8))


def test_quality_equals_a_hand_computation() -> None:
    before = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log()
    after = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]).log()
    text = HeldOut([1, 1, 0], (slice(1, 2), slice(1, 3)))
    found = measure(lambda ids: after, [text], [before], scheme="s", method="m", bits=4.0)
    assert found.kl == pytest.approx((0.25 * math.log(2) + 0.25 * math.log(2)) / 3)  # rows 0 and 2 swap two tokens
    assert found.agreement == pytest.approx(1 / 3)
    assert found.perplexity == pytest.approx(math.sqrt(2 * 4))  # of the tokens 1 (p = 1/2) and 0 (p = 1/4)
    assert found.recall == 1 / 2  # token 1 alone is right, tokens 1 and 0 are not both
    assert measure(lambda ids: before, [HeldOut([1, 1, 0])], [before], scheme="", method="", bits=0.0).recall is None


def test_kl_is_zero_for_the_float_model_and_grows_with_fewer_bits(folder: Path) -> None:
    cases = [case(f"int{bits}") for bits in (8, 6, 4, 3, 2)]
    rows, _ = quality.measure_cases(folder, cases, [HeldOut([5, 9, 3, 40, 7, 21, 2] * 3)], (), lambda name: None)
    assert rows[0].kl == 0 and rows[0].agreement == 1
    assert [one.kl for one in rows] == sorted(one.kl for one in rows) and rows[1].kl > 0


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g8", 4 + 16 / 8),
        ("int4-g8-asym", 4 + (16 + 4) / 8),
        ("int3-g-asym", 3 + (16 + 3) / 8),  # with the given group size, 8
        ("fp8-e4m3", None),
    ],
)
def test_bits_count_scales_and_zero_points(decoder: Decoder, name: str, bits: float | None) -> None:
    _, found = rounded_decoder(decoder, case(name), ())
    if bits is None:  # one scale per row
        shapes = [linear.weight.shape for _, linear in decoder.linears()]
        bits = 8 + 16 * sum(rows for rows, _ in shapes) / sum(rows * columns for rows, columns in shapes)
    assert found == pytest.approx(bits)


def test_a_scale_for_the_tensor_is_one_for_q_and_another_for_k(decoder: Decoder) -> None:
    some = rounded_decoder(decoder, case("int4-tensor-narrow"), ())[0]
    qkv = next(linear for name, linear in some.linears() if name.endswith("qkv")).weight
    before = next(linear for name, linear in decoder.linears() if name.endswith("qkv")).weight
    head, heads, kv = decoder.config.head_dim, decoder.config.num_heads, decoder.config.num_kv_heads
    for left, whole in zip(
        qkv.split([heads * head, kv * head, kv * head]), before.split([heads * head, kv * head, kv * head]), strict=True
    ):
        step = whole.abs().max() / 7
        torch.testing.assert_close(left, (whole / step).round() * step)


def test_w8a8_rounds_inputs_too(decoder: Decoder) -> None:
    both, weights = (rounded_decoder(decoder, case(name), ())[0] for name in ("w8a8", "w8a16"))
    ids = [5, 9, 3, 40, 7]
    assert not torch.equal(log_probs(both, ids), log_probs(weights, ids))
    torch.testing.assert_close(log_probs(both, ids), log_probs(weights, ids), atol=0.5, rtol=0)


def test_recall_is_that_of_generated_answers() -> None:
    llm = SimpleNamespace(tokenizer=Tokenizer.from_pretrained(storyteller.PATH))
    stories = held_out_stories(llm, 1, seed=3)  # type: ignore[arg-type]
    model = load_decoder(storyteller.PATH, torch.float32, method_of=lambda name: DENSE)
    spoilt = rounded_decoder(model, Case("int2", "rtn", Scheme(2)), ())[0]
    for one in (model, spoilt):
        right = 0
        for text in stories:
            for at in text.answers:
                ids = text.token_ids[: at.start]
                while len(ids) < at.stop and ids == text.token_ids[: len(ids)]:
                    ids = [*ids, int(log_probs(one, ids)[-1].argmax())]
                right += ids[at] == text.token_ids[at]
        reference = [log_probs(model, text.token_ids) for text in stories]
        found = measure(lambda ids, one=one: log_probs(one, ids), stories, reference, scheme="", method="", bits=0.0)
        assert found.recall == right / sum(len(text.answers) for text in stories)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "int9"], "bits=9"),
        (["--schemes", "int4-asym-narrow"], "scheme='int4-asym-narrow': must be one of"),
        (["--methods", "squeeze"], "method=squeeze: must be one of rtn"),
        (["--schemes", "nf4", "--methods", "gptq"], "scheme=nf4, method=gptq: nf4 and -tensor support only rtn"),
        (["--schemes", "int4", "--group-size", "16"], "group_size=16: needs a scheme with -g"),
        (["--schemes", "int4-g7"], "group_size=7: does not divide"),
        (["--schemes", "int4", "--calibration", "stories"], "calibration='stories': method rtn uses no text"),
        (["--text", "a.txt", "--calibration", "a.txt"], "text='a.txt': is also the calibration text"),
        (["--text", "missing.txt"], "text='missing.txt': cannot be read"),
        (["--dtype", "int8"], "dtype=int8: must be float32 or bfloat16"),
        (["--engine", "{"], "--engine '{'"),
        (["--engine", '{"bits": 4}'], "unknown option bits"),
        (["--no-quality", "--scale", "100"], "exceeds the model's"),
    ],
)
def test_bad_options_are_refused_in_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = ["bench", "quantisation", "--model", str(folder), "--figures", str(tmp_path), "--no-speed", *arguments]
    result = CliRunner().invoke(app, [word for word in words if "--scale" not in arguments or word != "--no-speed"])
    assert result.exit_code == 2 and message in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_engines_are_floats_and_the_schemes_with_kernels_and_what_is_given() -> None:
    cases = read_cases(["w4a16", "int3"], [], None)
    found = read_engines(cases, ["float32"], ['{"quantization": "w8a8", "block_size": 32}'], is_gguf=True)
    assert [*found] == ["float32", "w4a16 float32", "gguf float32", "w8a8, 32"]
    assert found["w8a8, 32"] == {"quantization": "w8a8", "block_size": 32}


def test_each_scheme_is_measured_with_each_method() -> None:
    assert [(one.scheme, one.method) for one in read_cases(["int4", "int3"], ["rtn", "gptq"], None)] == [
        ("int4", "rtn"), ("int4", "gptq"), ("int3", "rtn"), ("int3", "gptq"),
    ]  # fmt: skip
    assert len({(one.scheme, one.method) for one in read_cases([], [], None)}) == 24


def test_the_rest_of_the_given_memory_is_counted_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def peers(names: list[str], options: PeerOptions) -> Iterator[dict[str, object]]:
        asked.append(options)
        if options.engine.get("quantization") == "gguf":
            raise ValueError("no GGUF")
        yield {"paged": lambda request: SimpleNamespace(peak_bytes=10_000, kv_bytes_per_token=10)}

    asked: list[PeerOptions] = []
    monkeypatch.setattr(engines, "engine_peers", peers)
    options = peer_options(folder, "auto", workloads(50, 0.1, 0), 64, threads=1)
    config = SimpleNamespace(max_position_embeddings=64, vocab_size=50)
    some = {name: EngineOptions(quantization=name) for name in ("w8a16", "gguf")}
    found = weigh(options, some, config, 20_000, left_out := {})  # type: ignore[arg-type]
    assert left_out == {"gguf": "no GGUF"}
    assert found == {"w8a16": Memory(10_000 - 640, 160, (20_000 - 9_360) // 160)}
    assert asked[0].engine == {"load_format": "auto", "quantization": "w8a16"} and asked[0].pool_tokens == 64


def report() -> QuantisationReport:
    rows = [Quality("int4-g32-narrow", "smoothquant", 4.5, 0.00043, 0.983, 1.2979, 1.0)]
    rows += [Quality("int8-tensor-narrow", "rtn", 8.0, 0.0, 1.0, 1.3, None)]
    runs = {key: [TimedRun(2.0, 0.1), TimedRun(1.0, 0.0), TimedRun(9.0, 1.5)] for key in ("1", "4", "16", "32")}
    speed = {name: PeerResult(runs, {}, 5) for name in ("float32", "w8a16 bfloat16", "llama.cpp Q4_K_M")}
    tokens = {"1": 150, "4": 300, "16": 6_000, "32": 12_345}
    memory = {"w8a16 bfloat16": Memory(612_345_678, 737_280, 12_345)}
    names = dict.fromkeys(tokens, "requests")
    return QuantisationReport("m", {"cores": 2}, "30 stories", rows, 2**31, memory, names, tokens, speed, {"x": "y"})


def test_a_report_is_read_as_it_was_saved_and_keeps_the_half_that_is_not_measured(tmp_path: Path) -> None:
    one, path = report(), tmp_path / "some.json"
    one.save(path)
    assert QuantisationReport.read(path) == one
    assert QuantisationReport("m", {"cores": 4}).with_halves_of(path) == replace(one, machine={"cores": 4})
    assert QuantisationReport("another", {}).with_halves_of(path).quality == []


def test_rates_are_of_the_runs_that_were_not_disturbed() -> None:
    assert report().rates("float32") == [100, 200, 4_000, 8_230]


def test_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, lines
    assert any("0.00043" in line for line in lines) and any("8,230 1.00x" in line for line in lines)


def test_the_picture_has_a_place_for_each_half_that_was_measured() -> None:
    both = quantisation_figure(report())
    assert [axes.get_title("left") for axes in both.axes] == [
        "KL to float32, nats per token",
        "output tokens per second",
    ]
    assert len(quantisation_figure(replace(report(), speed={})).axes) == 1


def test_the_names_of_engines_are_beside_their_lines_and_cover_none() -> None:
    for one in (report(), replace(report(), quality=[])):
        figure = quantisation_figure(one)
        figure.draw_without_rendering()
        axes = figure.axes[-1]
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent()) and legend.x1 <= figure.bbox.x1


def test_a_gguf_is_named_by_its_type_and_two_of_one_name_are_refused() -> None:
    names = ["smollm2-Q4_K.gguf", "m.Q8_0.gguf", "some-q4_k_m.gguf", "model.gguf", "x-BF16.gguf"]
    assert llama.names_of([*map(Path, names)]) == ["Q4_K", "Q8_0", "Q4_K_M", "model", "BF16"]
    with pytest.raises(ValueError, match=r"gguf: a/m\.Q4_0\.gguf and b/n-Q4_0\.gguf are both Q4_0; rename one"):
        llama.names_of([Path("a/m.Q4_0.gguf"), Path("b/n-Q4_0.gguf")])


def test_a_model_of_its_own_is_measured_on_what_it_writes(folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(folder), "--figures", str(tmp_path), "--no-speed", "--num-texts", "2"]
    words += ["--schemes", "int4-g8", "--methods", "gptq", "--seed", "1"]
    result = CliRunner().invoke(app, ["bench", "quantisation", *words])
    assert result.exit_code == 0, result.output
    found = QuantisationReport.read(tmp_path / "bench-quantisation.json")
    assert [(one.scheme, one.method) for one in found.quality] == [("float32", "-"), ("int4-g8", "gptq")]
    assert found.texts.startswith("2 texts of its own") and found.quality[1].kl > 0
    assert (tmp_path / "bench-quantisation.png").stat().st_size > 1_000


def test_llama_cpp_is_measured_as_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text, logits = HeldOut([1, 0, 2]), torch.randn(3, 4)

    class Llama:
        def __init__(self, file: str, **options: object) -> None:
            assert options["n_ctx"] == 3 and options["logits_all"]
            self.scores = torch.zeros(3, 4).numpy()

        def reset(self) -> None: ...

        def eval(self, ids: list[int]) -> None:
            assert ids == text.token_ids
            self.scores[:] = logits.numpy()

        def close(self) -> None: ...

    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    monkeypatch.setattr(llama, "file_bits", lambda file: 8.5)
    found = llama.llama_quality(Path("some.gguf"), "Q8_0", [text], [logits.log_softmax(-1)], threads=2)
    assert (found.scheme, found.method, found.bits, found.agreement) == ("Q8_0", "llama.cpp", 8.5, 1.0)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_quantised_engines_take_turns_in_processes_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "BUSY_CORES", math.inf)  # no run is repeated, however busy the machine is
    report().save(tmp_path / "bench-quantisation.json")
    words = ["--model", str(folder), "--figures", str(tmp_path), "--no-quality", "--dtype", "float32", "--repeats", "1"]
    words += ["--schemes", "w8a16", "--scale", "0.1", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", "quantisation", *words])
    assert result.exit_code == 0, result.output
    found = QuantisationReport.read(tmp_path / "bench-quantisation.json")
    assert [*found.speed] == ["float32", "w8a16 float32"] and min(found.rates("w8a16 float32")) > 0
    assert found.left_out == {} and found.quality == []  # the numbers in the file are of another model
    if PROC.exists():
        assert found.memory["float32"].block_bytes == found.memory["w8a16 float32"].block_bytes > 0
