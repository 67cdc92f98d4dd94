"""Prefill and decode in two engines (vLLM: disaggregated prefill), each in a process of its own.

    request --> prefill engine      computes the prompt, and one token, which is dropped
                     |  full blocks of the prompt (block_exchange), one prompt at a time
                     v
                decode engine       computes the rest of the prompt, less than a block, and all tokens of the answer

The prefill engine is given no more prompts at once than its pool can hold, so none is evicted before it is handed over.

A long prompt then does not delay the next token of other requests. This does not raise throughput: the same work is
divided between two engines that cannot help each other. With one engine, chunked prefill bounds that delay instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from paged_infer.control.admission import add_sequences
from paged_infer.control.request import Request
from paged_infer.engine.block_exchange import open_exchange, receive_blocks, send_blocks
from paged_infer.engine.engine_process import EngineProcess
from paged_infer.engine.output_channel import Delivery, OutputChannel, deliver
from paged_infer.engine.process_messages import EngineInfo, EngineSpec
from paged_infer.engine.routing import Load
from paged_infer.execution.errors import EngineDeadError
from paged_infer.params import SamplingParams

logger = logging.getLogger(__name__)
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
SHARED_MEMORY = "/dev/shm"


@dataclass(slots=True, eq=False)
class _Prefill(OutputChannel):
    """A request whose prompt is being computed or handed over, and the channel of that prompt.

    The PrefillDecode stands in for its event loop.
    """

    request: Request | None = None
    num_blocks: int = 0  # of its prompt
    channel: OutputChannel | None = None  # of its answer
    streamed: bool = False
    is_aborted: bool = False


class PrefillDecode(EngineProcess):
    """The decode engine, which gets its prompts from ``prefill``, an engine with the same ``spec``."""

    def __init__(self, spec: EngineSpec, max_num_waiting: int | None = None) -> None:
        self._prefills: list[_Prefill] = []  # guarded by _lock, as are the next four
        self._waiting: deque[_Prefill] = deque()  # for room in the prefill engine
        self._num_blocks = 0  # of the prompts that are not waiting
        self._to_hand_over: deque[_Prefill] = deque()  # the first is being handed over
        self._is_finishing = False  # the decode engine stops when it has been given all prompts
        self._path = ""
        super().__init__(spec, "the decode engine", max_num_waiting)
        try:
            self.prefill = EngineProcess(spec, "the prefill engine", on_end=self._prefill_has_ended)
        except BaseException:  # Ctrl-C, too
            super().stop()
            raise
        self._on_end = self._has_ended

    def wait_until_ready(self) -> EngineInfo:
        """Wait for both engines (see ``EngineProcess.wait_until_ready``), and let them map a common file.

        The file is deleted immediately, so its memory is freed when both have ended, for whatever reason.
        """
        self.prefill.wait_until_ready()
        info = super().wait_until_ready()
        memory = info.memory
        self._block_size, self._max_num_blocks = memory.block_size, memory.num_blocks
        num_blocks = -(-memory.max_model_len // memory.block_size)
        num_bytes = num_blocks * memory.block_size * memory.kv_bytes_per_token
        with tempfile.NamedTemporaryFile(prefix="paged_infer-", dir=folder_for(num_bytes)) as file:
            self._path = file.name
            opened = partial(open_exchange, path=file.name, num_blocks=num_blocks)
            for one in (self.prefill, self):
                one.call(opened).result()
        return info

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        """See ``EngineThread.add``."""
        num_blocks = len(request.prompt_token_ids) // self._block_size + 1
        one = _Prefill(cast(Any, self), request=request, num_blocks=num_blocks, channel=channel, streamed=streamed)
        with self._lock:
            self._check_accepts()
            self._prefills.append(one)
            self._waiting.append(one)
            self._start_prefills()

    def _start_prefills(self) -> None:
        while self._waiting and self._has_room_for(self._waiting[0]):
            one = self._waiting.popleft()
            assert one.request is not None
            self._num_blocks += one.num_blocks
            with contextlib.suppress(EngineDeadError):  # then this one is killed too: see _has_ended
                self.prefill.add(_prompt_of(one.request), one, False)

    def _has_room_for(self, one: _Prefill) -> bool:
        return not self._num_blocks or self._num_blocks + one.num_blocks <= self._max_num_blocks

    def _load(self) -> Load:
        """Prompts that are being computed or handed over count as waiting."""
        decode = super()._load()
        return Load(
            decode.waiting + sum(len(one.request.sequences) for one in self._prefills if one.request), decode.running
        )

    def call_soon_threadsafe(self, put_all: Callable[..., object], deliveries: Iterable[Delivery]) -> None:
        """The prompts' channels call this as their event loop, when a prompt is computed or has failed.

        The decode engine computes the prompts that failed.
        """
        for one, _ in deliveries:
            assert isinstance(one, _Prefill)
            with self._lock:
                self._to_hand_over.append(one)
                is_first = len(self._to_hand_over) == 1
            if is_first:
                self._hand_over(one)

    def _hand_over(self, one: _Prefill) -> None:
        assert one.request is not None
        request_id, chain = one.request.request_id, one.request.sequences[0].hash_chain(self._block_size)

        def receive(sent: Future[list[bytes]]) -> None:
            if (error := sent.exception()) is not None and self.error is None:
                logger.warning("no blocks of request %s were handed over: %s", request_id, error)
            receipt = [] if error is not None else sent.result()
            received = self.call(partial(receive_blocks, path=self._path, chain=chain, receipt=receipt))
            received.add_done_callback(lambda _: self._decode(one))

        self.prefill.call(partial(send_blocks, path=self._path, chain=chain)).add_done_callback(receive)

    def _decode(self, one: _Prefill) -> None:
        """Give the decode engine a request whose blocks have been handed over."""
        with self._lock:
            if one not in self._prefills or (self.error is not None and not self._is_finishing):
                return  # _has_ended ends it
            assert one.request is not None and one.channel is not None
            self._to_hand_over.popleft()
            self._prefills.remove(one)
            self._num_blocks -= one.num_blocks
            self._start_prefills()
            self._send(one.request, one.channel, one.streamed)
            following = self._to_hand_over[0] if self._to_hand_over else None
            is_last = self._is_finishing and not self._prefills
            self._is_finishing &= not is_last
        if one.is_aborted:
            super().abort(one.request.request_id)
        if following is not None:
            self._hand_over(following)
        elif is_last:
            self._stop(finish=True)

    def abort(self, request_id: str) -> None:
        """See ``EngineThread.abort``."""
        with self._lock:
            for one in self._prefills:
                one.is_aborted |= one.request is not None and one.request.request_id == request_id
        self.prefill.abort(request_id)
        super().abort(request_id)

    # -- the end ----------------------------------------------------------------------------------------------------

    def stop(self, finish: bool = False) -> None:
        """See ``EngineThread.stop``."""
        with self._lock:
            self.error = self.error or EngineDeadError("the engine has been shut down")
            self._is_finishing = finish and bool(self._prefills)
        if not self._is_finishing:
            self._stop(finish)

    def _stop(self, finish: bool) -> None:
        self.prefill.stop()
        super().stop(finish)

    def abandon(self, reason: str) -> None:
        """See ``EngineProcess.abandon``; applies to both engines."""
        super().abandon(reason)
        self.prefill.abandon(reason)

    def _prefill_has_ended(self, ended: EngineProcess) -> None:
        if self.error is None or self._is_finishing:
            self.abandon(str(ended.error))

    def _has_ended(self, _: EngineProcess) -> None:
        """The decode engine has ended: end the requests that it has not been given."""
        self.prefill.stop()
        with self._lock:
            left = [one.channel for one in self._prefills if one.channel is not None]
            self._prefills.clear()
            self._waiting.clear()
        deliver([(channel, self._dead()) for channel in left])


def folder_for(num_bytes: int) -> str | None:
    """The folder for the file: shared memory if it has room, or else the folder for temporary files (None).

    The file takes memory as it is written, and SIGBUS ends a process that writes when none is left. Containers often
    have only 64 MB of shared memory.
    """
    has_room = os.path.isdir(SHARED_MEMORY) and shutil.disk_usage(SHARED_MEMORY).free >= num_bytes
    return SHARED_MEMORY if has_room else None


def _prompt_of(request: Request) -> Request:
    """A request for the prompt and one token."""
    first, num_tokens = request.sequences[0], len(request.prompt_token_ids)
    prompt = Request(
        request.request_id,
        None,
        request.prompt_token_ids,
        ONE_TOKEN,
        request.arrival_time_s,
        request.cache_salt,
        priority=request.priority,
    )
    add_sequences(prompt, first.sequence_id, first.seed, num_tokens + 1, [])
    return prompt
