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
import queue
import shutil
import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial

from paged_infer.control.admission import add_sequences
from paged_infer.control.request import Request
from paged_infer.engine.block_exchange import open_exchange, receive_blocks, send_blocks
from paged_infer.engine.engine_process import EngineProcess
from paged_infer.engine.output_channel import Delivery, OutputChannel
from paged_infer.engine.process_messages import EngineInfo, EngineSpec
from paged_infer.engine.routing import Load
from paged_infer.execution.errors import EngineDeadError
from paged_infer.params import SamplingParams

logger = logging.getLogger(__name__)
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
SHARED_MEMORY = "/dev/shm"


@dataclass(slots=True, eq=False, kw_only=True)
class _Prefill(OutputChannel):
    """A request whose prompt is being computed or handed over, and the channel of that prompt.

    The PrefillDecode stands in for its event loop.
    """

    request: Request
    num_blocks: int  # of its prompt
    channel: OutputChannel  # of its answer
    streamed: bool
    is_aborted: bool = False


class PrefillDecode(EngineProcess):
    """The decode engine, which gets its prompts from ``prefill``, an engine with the same ``spec``."""

    def __init__(self, spec: EngineSpec, max_num_waiting: int | None = None) -> None:
        self._prefills: list[_Prefill] = []  # guarded by _lock, as are the next three
        self._waiting: deque[_Prefill] = deque()  # for room in the prefill engine
        self._num_blocks = 0  # of the prompts that are not waiting
        self._is_finishing = False  # the decode engine stops when it has been given all prompts
        self._to_hand_over: queue.SimpleQueue[_Prefill | None] = queue.SimpleQueue()
        self._path = ""
        super().__init__(spec, "the decode engine", max_num_waiting)
        try:
            self.prefill = EngineProcess(spec, "the prefill engine", on_end=self._prefill_has_ended)
        except BaseException:  # Ctrl-C, too
            super().stop()
            raise
        self._on_end = self._has_ended
        threading.Thread(target=self._hand_over_all, name="hand over", daemon=True).start()

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
        num_blocks = len(request.prompt_token_ids) // self._block_size + 1
        one = _Prefill(self, request=request, num_blocks=num_blocks, channel=channel, streamed=streamed)
        with self._lock:
            self._check_accepts(self.load.waiting)
            self._prefills.append(one)
            self._waiting.append(one)
            self._start_prefills()

    def _start_prefills(self) -> None:
        while self._waiting and self._has_room_for(self._waiting[0]):
            one = self._waiting.popleft()
            self._num_blocks += one.num_blocks
            with contextlib.suppress(EngineDeadError):  # then this one is killed too: see _has_ended
                self.prefill.add(_prompt_of(one.request), one, False)

    def _has_room_for(self, one: _Prefill) -> bool:
        return not self._num_blocks or self._num_blocks + one.num_blocks <= self._max_num_blocks

    @property
    def load(self) -> Load:
        """Prompts that are being computed or handed over count as waiting."""
        with self._lock:
            coming = sum(len(one.request.sequences) for one in self._prefills)
            decode = super().load
            return Load(decode.waiting + coming, decode.running)

    def call_soon_threadsafe(self, put_all: object, deliveries: list[Delivery]) -> None:
        """The prompts' channels call this as their event loop, when a prompt is computed or has failed.

        The decode engine computes the prompts that failed.
        """
        for one, _ in deliveries:
            assert isinstance(one, _Prefill)
            self._to_hand_over.put(one)

    def _hand_over_all(self) -> None:
        while (one := self._to_hand_over.get()) is not None:
            request_id, chain = one.request.request_id, one.request.sequences[0].hash_chain(self._block_size)
            try:
                receipt = self.prefill.call(partial(send_blocks, path=self._path, chain=chain)).result()
                self.call(partial(receive_blocks, path=self._path, chain=chain, receipt=receipt)).result()
            except Exception as error:
                if self.error is None:
                    logger.warning("no blocks of request %s were handed over: %s", request_id, error)
            self._decode(one)

    def _decode(self, one: _Prefill) -> None:
        """Give the decode engine a request whose blocks have been handed over, if they were computed."""
        with self._lock:
            is_over = self.gone.is_set() or (self.error is not None and not self._is_finishing)
            if is_over or one not in self._prefills:
                return  # _has_ended ends it
            self._prefills.remove(one)
            self._num_blocks -= one.num_blocks
            self._start_prefills()
            self._send(one.request, one.channel, one.streamed)
            is_last = self._is_finishing and not self._prefills
            self._is_finishing &= not is_last
        if one.is_aborted:
            super().abort(one.request.request_id)
        if is_last:
            self._stop(finish=True)

    def abort(self, request_id: str) -> None:
        with self._lock:
            for one in self._prefills:
                one.is_aborted |= one.request.request_id == request_id
        self.prefill.abort(request_id)
        super().abort(request_id)

    # -- the end ----------------------------------------------------------------------------------------------------

    def stop(self, finish: bool = False) -> None:
        with self._lock:
            self._shut_down()
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
        self._to_hand_over.put(None)
        with self._lock:
            left = [one.channel for one in self._prefills]
            self._prefills.clear()
            self._waiting.clear()
        self._fail(left)


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
