"""The engine: one step, its threads, and its classes next to vLLM's."""

from __future__ import annotations

from .drawing import Drawing


def engine_step() -> Drawing:
    d = Drawing(
        860,
        560,
        "One step of the engine: LLMEngine.step",
        "The scheduler makes a ScheduledStep from the queues. The model runner packs it, the decoder computes it with "
        "the paged cache, and the sampler draws tokens. The StepResult is settled: tokens are appended, ended "
        "sequences free their blocks, new tokens become text, and a StepReport goes to the caller.",
    )
    d.lane(16, 48, 828, 92, "**engine, text**")
    d.lane(16, 164, 828, 96, "**control**", below=True)
    d.lane(16, 348, 828, 190, "**execution, model, sampling**", below=True)
    process = d.box(32, 78, 184, 50, "`InputProcessor.process`", "_text to token ids_")
    report = d.box(410, 78, 184, 50, "`StepReport`", "_outputs for the callers_", tone="green")
    text = d.box(644, 78, 184, 50, "`OutputProcessor`", "_tokens to text, stops_")
    schedule = d.box(32, 176, 184, 50, "`Scheduler.schedule`", "_a Policy fills a StepPlan_", tone="blue")
    queues = d.box(300, 176, 196, 50, "`Queues`", "_waiting, running, swapped_")
    settle = d.box(644, 176, 184, 50, "`Scheduler.settle`", "_append, end, free blocks_", tone="blue")
    step = d.box(32, 286, 184, 36, "`ScheduledStep`", tone="amber")
    result = d.box(644, 286, 184, 36, "`StepResult`", tone="amber")
    launch = d.box(32, 364, 184, 52, "`ModelRunner.launch`", "_move blocks, pack tokens_", tone="blue")
    forward = d.box(268, 364, 140, 52, "`Decoder.forward`", "_layers, then logits_", tone="blue")
    sample = d.box(466, 364, 130, 52, "`Sampler.sample`", "_one token per row_", tone="blue")
    read = d.box(644, 364, 184, 52, "`RunningStep.result`", "_wait for the device_", tone="blue")
    d.box(240, 452, 196, 52, "`PagedCache.attend`", "_store k, v; read the blocks_", tone="violet")

    d.arrow(process.right, (398, 103), queues.top)
    d.label(307, 95, "`Request`", "middle")
    d.arrow(queues.left, schedule.right)
    d.arrow(schedule.bottom, step.top)
    d.arrow(step.bottom, launch.top)
    d.label(230, 300, "`Executor.launch`")
    d.label(230, 318, "_plain data: an executor may run in other processes_")
    for box, following, shape in ((launch, forward, "[T]"), (forward, sample, "[R, V]"), (sample, read, "[R]")):
        d.arrow(box.right, following.left)
        d.label((box.right[0] + following.left[0] - 6) / 2, 383, shape, "middle")
    d.arrow((318, 416), (318, 452))
    d.arrow((358, 452), (358, 416))
    d.label(308, 439, "_q, k, v_", "end")
    d.label(368, 439, "_in each layer_")
    d.label(452, 475, "_T tokens of any sequences, R rows that sample,_")
    d.label(452, 493, "_V entries of the vocabulary_")
    d.arrow(read.top, result.bottom)
    d.arrow(result.top, settle.bottom)
    d.arrow(settle.left, queues.right)
    d.label(570, 194, "_the next step_", "middle")
    d.arrow(settle.top, text.bottom)
    d.arrow(text.left, report.right)
    return d


def threads() -> Drawing:
    d = Drawing(
        860,
        480,
        "Many requests, one event loop, one engine thread",
        "Tasks in the event loop submit requests to the inbox of the engine thread and await their output channels. "
        "The engine thread takes commands, runs a step and delivers its outputs by call_soon_threadsafe. Long texts "
        "are tokenized in a thread of their own, and a watchdog observes the step.",
    )
    d.lane(150, 52, 284, 322, "**event loop thread**")
    d.lane(606, 52, 238, 322, "**engine thread**")
    d.lane(606, 384, 238, 82, "**watchdog thread**")
    d.box(16, 52, 116, 96, "**tokenizer**", "**thread**", "`TextQueue`", "_long texts_", tone="lane")
    submit = d.box(184, 84, 216, 54, "`AsyncLLM.submit`", "_check, tokenize, post_", tone="blue")
    inbox = d.box(456, 84, 128, 54, "**inbox**", "`add, abort, call`", tone="amber")
    commands = d.box(624, 84, 192, 54, "`_process_commands`", "_between two steps_", tone="blue")
    step = d.box(624, 188, 192, 54, "`LLMEngine.step`", "_one for all requests_", tone="blue")
    deliver = d.box(624, 292, 192, 54, "`_deliver`", "`call_soon_threadsafe`", tone="blue")
    watchdog = d.box(624, 412, 192, 44, "`Watchdog`", "_abandons a hung step_")
    for i, name in enumerate("ABC"):
        y = 176 + 66 * i
        d.box(16, y, 92, 48, f"client {name}", "_HTTP_")
        task = d.box(184, y, 216, 48, f"task {name}", "`async for output in stream`", tone="green")
        channel = d.box(456, y, 128, 48, "`OutputChannel`", f"_newest of {name}_", tone="amber")
        d.arrow((108, y + 15), (184, y + 15))
        d.arrow((184, y + 33), (108, y + 33))
        d.arrow(channel.left, task.right)
        d.arrow((606, y + 24), channel.right)
    d.line(deliver.left, (606, 319))
    d.line((606, 200), (606, 332))
    d.arrow((292, 176), submit.bottom)
    d.arrow((184, 102), (132, 102), dashed=True)
    d.arrow((132, 122), (184, 122), dashed=True)
    d.chain(submit, inbox, commands)
    d.arrow(commands.bottom, step.top)
    d.arrow(step.bottom, deliver.top)
    d.arrow(deliver.right, (830, 319), (830, 111), commands.right)
    d.arrow((790, watchdog.y), (790, 374), dashed=True)
    d.label(16, 410, "_An async generator yields what its channel holds: await puts only its own task to sleep._")
    d.label(16, 430, "_The engine thread runs no code of the loop: it asks the loop, once a step, to fill channels._")
    d.label(16, 450, "_A newer output replaces one that has not been read, so a slow client costs no memory._")
    return d


GROUPS = {  # by vLLM V1's process: our name, vLLM's, and what differs
    "the caller's process": (
        ("LLM, AsyncLLM", "LLM, AsyncLLM", "options and parameters by the same names"),
        ("InputProcessor", "InputProcessor", "text to token ids, checks"),
        ("OutputProcessor", "OutputProcessor", "token ids to text; ours in the engine thread"),
        ("EngineThread", "EngineCoreClient", "a thread with an inbox; sockets (ZMQ)"),
    ),
    "the engine's process": (
        ("LLMEngine.step", "EngineCore.step", "schedule, compute, settle"),
        ("Scheduler.schedule", "Scheduler.schedule", "running first; V1 preempts by recomputing only"),
        ("Scheduler.settle", "Scheduler.update_from_output", "append tokens, free blocks"),
        ("BlockManager", "KVCacheManager", "block tables, prefix cache hits"),
        ("BlockPool", "BlockPool", "free blocks, reference counts, hashes"),
        ("ScheduledStep", "SchedulerOutput", "plain data; V1 sends only what is new"),
    ),
    "a process for each GPU; the engine's own if there is one GPU": (
        ("InProcessExecutor", "Executor, Worker", "ours: one process; V1: a Worker for each GPU"),
        ("ModelRunner", "GPUModelRunner", "flat tokens; V1 updates a persistent batch"),
        ("Sampler", "Sampler", "logits to token ids"),
        ("StepResult", "ModelRunnerOutput", "sampled token ids"),
    ),
}


def vllm_map() -> Drawing:
    num_rows = sum(map(len, GROUPS.values()))
    height = 34 * num_rows + 40 * len(GROUPS)
    d = Drawing(
        860,
        height + 86,
        "The classes of paged_infer and of vLLM V1",
        "; ".join(f"{ours}: {theirs} ({words})" for rows in GROUPS.values() for ours, theirs, words in rows),
    )
    d.label(32, 66, "**paged_infer**")
    d.label(262, 66, "**vLLM V1**")
    d.lane(16, 78, 204, height - 8, "**one process**")
    y = 78
    for process, rows in GROUPS.items():
        d.lane(246, y, 598, 34 * len(rows) + 32, f"**{process}**")
        y += 30
        for ours, theirs, words in rows:
            left = d.box(30, y, 176, 26, f"`{ours}`", tone="blue")
            right = d.box(260, y, 222, 26, f"`{theirs}`", tone="green", foreign=True)
            d.line(left.right, right.left)
            d.label(496, y + 18, f"_{words}_")
            y += 34
        y += 10
    return d
