"""The main function of an engine's process (vLLM V1: EngineCoreProc); ``engine.engine_process`` starts it.

    main thread      loads the model, then waits for the engine's thread to end
    reader thread    commands from the pipe -> EngineThread; this process ends when the client's has ended
    engine's thread  steps, and sends one message after each

The client alone decides when it ends: SIGINT and SIGTERM, which a terminal or a supervisor sends to all processes of
a group, are ignored here, so that running requests may finish.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from paged_infer.control.request import Request
from paged_infer.engine import process_messages as messages
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.engine_thread import EngineThread
from paged_infer.engine.output_channel import Delivery, OutputChannel
from paged_infer.engine.output_delta import OutputEncoder
from paged_infer.engine.process_messages import EngineInfo, EngineSpec, portable
from paged_infer.engine.request_states import StepReport

logger = logging.getLogger(__name__)
LAST_STEP_S = 5.0  # for the running step to return after the client's process has ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_engine(connection: Connection, spec: EngineSpec) -> None:
    """Serve one engine over ``connection`` until the client stops it or ends. Unblocks SIGNALS."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the processes of the executor would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if spec.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = spec.visible_devices
    is_orderly = serve_engine(connection, spec)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0 if is_orderly else 1)  # immediately: a step may hang, and the interpreter takes seconds to clean up


def serve_engine(connection: Connection, spec: EngineSpec) -> bool:
    """``run_engine`` without the signals and the exit. Returns False if the engine was not built, failed or hangs."""
    torch.set_num_threads(spec.num_threads)
    core = _EngineCore(connection)
    threading.Thread(target=core.read_commands, name="commands", daemon=True).start()
    try:
        engine = LLMEngine(spec.folder, spec.config)
    except ValueError as error:
        core.send(messages.Refused(str(error)))
        return False
    except Exception as error:
        logger.exception("the engine could not be started")
        core.send(messages.Ended(f"the engine could not be started: {type(error).__name__}: {error}"))
        return False
    return core.serve(engine, spec.step_timeout_s)


@dataclass(slots=True, eq=False, kw_only=True)
class _Channel(OutputChannel):
    """Stands for the client's channel of one request; its loop is the ``_EngineCore``."""

    request_id: str


class _EngineCore:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._encoder = OutputEncoder()
        self._started: Future[EngineThread] = Future()

    @property
    def _thread(self) -> EngineThread:
        return self._started.result()  # waits until the engine is built

    def send(self, message: messages.Message) -> None:
        with self._sending, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader thread sees it too
            messages.send(self._connection, message)

    def serve(self, engine: LLMEngine, step_timeout_s: float | None) -> bool:
        """Returns when the engine's thread has ended: False if it failed or was abandoned."""
        thread = EngineThread(engine, sys.maxsize, step_timeout_s)
        thread.observers.append(self._send_step)
        self.send(messages.Ready(EngineInfo(engine.model_config, engine.memory, engine.stats()), time.perf_counter()))
        self._started.set_result(thread)
        is_orderly = thread.join() and not (thread.has_failed or thread.is_abandoned)
        self.send(messages.Ended(None if is_orderly else str(thread.error)))
        return is_orderly

    # -- reader thread ----------------------------------------------------------------------------------------------

    def read_commands(self) -> None:
        try:
            while True:
                commands: list[messages.Command] = messages.receive(self._connection)
                for command in commands:
                    self._process(command)
        except (EOFError, OSError):
            pass
        except BaseException:
            logger.exception("a command could not be read")
        if self._started.done():
            self._thread.stop()
            self._thread.join(LAST_STEP_S)
        os._exit(1)

    def _process(self, command: messages.Command) -> None:
        thread = self._thread
        if isinstance(command, messages.Add):
            request = command.request
            channel = _Channel(self, request_id=request.request_id)
            self._compile_grammar(request)
            try:
                thread.add(request, channel, command.streamed)
            except RuntimeError as error:  # the engine has stopped
                self.send(messages.Failed(request.request_id, portable(error), thread.num_submitted))
        elif isinstance(command, messages.Abort):
            thread.abort(command.request_id)
        elif isinstance(command, messages.Stop):
            thread.stop(command.finish)
        else:
            self._call(command)

    def _compile_grammar(self, request: Request) -> None:
        """In this thread: the engine's, which then finds it compiled, goes on meanwhile with other requests."""
        if (asked := request.params.structured_outputs) is not None:
            with contextlib.suppress(ValueError):  # which the engine's thread will send
                self._thread.engine.input_processor.grammars.get(asked)

    def _call(self, command: messages.Call) -> None:
        try:
            function = pickle.loads(command.function)
        except Exception as error:
            self.send(messages.Answer(command.number, None, portable(error)))
        else:
            self._thread.call(function).add_done_callback(lambda done: self._answer(command.number, done))

    def _answer(self, number: int, done: Future[Any]) -> None:
        if (error := done.exception()) is not None:
            self.send(messages.Answer(number, None, portable(error)))
            return
        try:
            self.send(messages.Answer(number, done.result(), None))
        except Exception as unsendable:  # pickle raises anything
            self.send(messages.Answer(number, None, TypeError(f"the answer cannot be sent: {unsendable}")))

    # -- engine's thread --------------------------------------------------------------------------------------------

    def _send_step(self, report: StepReport) -> None:
        try:
            self._try_to_send(report)
        except Exception as error:  # an observer that fails is removed, and the client would wait forever
            logger.exception("the outputs of a step could not be sent")
            self._thread.abandon(f"the outputs of a step could not be sent: {error}")

    def _try_to_send(self, report: StepReport) -> None:
        deltas = [self._encoder.encode(output) for output in report.outputs]
        grown = [(sequence.request_id, sequence.sample_index) for sequence in report.grown]
        stats = self._thread.engine.stats()
        self.send(messages.Stepped(deltas, grown, report.now, stats, self._thread.num_submitted))

    def call_soon_threadsafe(self, put_all: object, deliveries: list[Delivery]) -> None:
        """The channels call this as their event loop. Send failures; ``_send_step`` has already sent the outputs."""
        for channel, item in deliveries:
            if isinstance(item, Exception):
                assert isinstance(channel, _Channel)
                self.send(messages.Failed(channel.request_id, portable(item), self._thread.num_submitted))
