"""The loop: read a request, run its row, wait for blocks if any are missing, write the reply.

Everything below runs to its end without waiting.  An operation that meets a block which is not in memory raises
``BlockMiss``; its blocks are fetched and it runs again from the top, with nothing left over from the first attempt.
File data that are not resident are read by a worker thread, which writes the reply itself.

V1  Each request is answered exactly once, FORGET and its kin never: whoever takes it out of ``_waiting`` answers it.
V2  No request, no disk and no peer can end the loop: ``_attempt`` is the one place that catches whatever is raised.
V3  At most ``WAITING_MOST`` requests wait; from then on none is read, so memory is bounded.
V4  Only the loop's thread touches the core and the session; worker threads see a plan, a buffer and the two devices.
V5  A block that was freed is not used again while a READ that was planned before may still look there.
V6  What a ``WritePlan`` was made of does not change until its step is taken: plan, data and step are one turn.
V7  Who finds a disk full is not told before what may still come: see ``waiting.Hopeful``.
"""

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fusewire import fileio, log, ops, uapi, wire
from fusewire.batchwriter import Log
from fusewire.blockdev import BlockDevice
from fusewire.committer import Committer
from fusewire.ext4 import commit, mountstate
from fusewire.ext4.batch import ClosedBatch
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Corrupt, Refused, errno_of
from fusewire.ext4.transaction import CommitFirst
from fusewire.fetcher import Fetcher
from fusewire.fileio import Plan
from fusewire.filewrite import DiscardPlan, ReadPlan, Stream, WritePlan
from fusewire.handlers import housekeeping
from fusewire.onerror import OnError
from fusewire.ops import Op
from fusewire.options import DEFAULT_COMMIT_SECONDS
from fusewire.remount import MountFlags
from fusewire.reporter import Reporter
from fusewire.session import Durable, Final, Session, Shutdown, WrittenBack, node_of
from fusewire.waiting import Hopeful, Starved, Step, Waiter
from fusewire.wire import Pieces, ProtocolError, Request
from fusewire.wirelog import WireLog
from fusewire.workers import Workers

TICK_SECONDS = 1.0
DRAIN_MOST = 32         # requests per wake-up: one wake-up each costs 1 µs more, more would starve the other events
LINGER_TRIES = 30       # reads of nothing before we sleep, 1 µs each: to be woken takes both sides longer than that
WAITING_MOST = 1024     # requests that wait; the kernel sends 64 in the background, the others are a process each
ATTEMPTS_MOST = 10_000  # runs of one operation; the largest directory of the longest search needs a few hundred
INLINE_ATTEMPTS = 16    # of them in a row before others get their turn
STOP_SECONDS = 2.0      # for worker threads to end
RECEIVE_BYTES = fileio.READ_MOST_BYTES + 4096   # the largest WRITE and its headers; untouched pages cost nothing

_INIT: int = uapi.FUSE_INIT
_GONE = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPERM, errno.EBADF, errno.EPIPE))
_AGAIN = frozenset((errno.ENOENT, errno.EINTR))    # the request was taken back before it was read


class Server:
    """Serves one session on one fd, a mounted ``/dev/fuse`` or the socket of a test that plays the kernel."""

    def __init__(self, fd: int, session: Session, device: BlockDevice, wirelog: WireLog | None = None,
                 journal: Log | None = None, commit_seconds: int = DEFAULT_COMMIT_SECONDS, discard: bool = False,
                 errors: str = "continue") -> None:
        """Serve ``session`` on ``fd``; ``journal``, ``commit_seconds`` and ``discard`` are the committer's, if the
        file system may be changed, and ``errors`` what is to follow when it turns out to be corrupt (``onerror``)."""
        self._fd = fd
        self._session = session
        self._device = device
        self._choose_rows()
        self._shapes = wire.SHAPES
        self._wirelog = wirelog
        self._workers = Workers()
        self._asker = Workers(1)            # waits for WRITEs, which may wait for the others
        self._view = memoryview(bytearray(RECEIVE_BYTES))
        self._buffers = [self._view]
        self._buffer = fileio.buffer()      # for data and blocks that are read without waiting
        self._fetcher = Fetcher(device, session.fs, self._buffer, self._workers, self._attempt, self._post,
                                self._resume_step)
        self._waiting: dict[int, Waiter] = {}
        self._reading = False
        self._home = 0                      # the loop's thread
        self._committer = Committer(session.fs, device, journal, self._post, commit_seconds, discard) \
            if session.fs.writing else None
        self._on_error = OnError(session, errors, self._committer.commit, self._turn_read_only, self.stop) \
            if self._committer is not None else None
        self._plans: set[int] = set()       # READs that threads carry out on a file system that changes
        self._held_back: list[tuple[ClosedBatch, set[int]]] = []    # durable batches, and the READs they wait for
        self._closing = False               # nobody's changes are taken any more
        self._hopeful = Hopeful()
        self._parked: list[Waiter] = []     # steps that wait for what only a READ under way keeps from being used
        self._background = 0                # steps that wait and that nobody has asked for
        self._quiet: asyncio.Future[None] | None = None     # told when there are none
        self._last: asyncio.Future[None] | None = None      # the answer to DESTROY
        self._stream = Stream(lambda *of: self._workers.submit(lambda _buffer: device.begin_writing(*of)))
        self._told: set[int] = set()        # inodes that the kernel was told of as outdated since the last tick
        self._report = Reporter(self._found_corrupt)
        self._carriers: dict[type, Callable[[Any, Any], None]] = {
            Plan: self._send_data, WritePlan: self._write_data, ReadPlan: self._read_for, DiscardPlan: self._discard,
            WrittenBack: self._have_written_back, Durable: self._send_when_durable, Shutdown: self._shut_down,
            Final: self._answer_finally}

    async def serve(self) -> None:
        """Serve until the kernel, or ``stop``, ends the connection."""
        self._loop = asyncio.get_running_loop()
        self._home = threading.get_ident()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(self._fd, False)
        if self._committer is not None:
            self._committer.on_failure = self._turn_read_only
            self._committer.on_durable = self._allow_reuse
            self._committer.start(mountstate.in_use(self._session.fs, int(time.time()), self._session.target))
            self._loop.call_later(TICK_SECONDS, self._tick)
        self._resume()
        try:
            await self._ended
            if self._last is not None:
                await self._last
            await self._put_away_or_tell()
        finally:
            self._pause()
            self._fd = -1   # a thread that a dead device holds must not write to whatever gets this number next
            self._asker.stop(STOP_SECONDS)
            self._workers.stop(STOP_SECONDS)

    async def _put_away(self) -> None:
        """Everything that was done goes to its place, and the file system is marked clean; once."""
        committer, session = self._committer, self._session
        if committer is None:
            return
        self._pause()
        self._closing = True
        self._turn_read_only()
        session.lookups.clear()
        for number in list(session.fs.writing.orphans if session.fs.writing else ()):
            self._attempt(None, self._take_step, None, partial(housekeeping.release, session, number))
        for _ in range(2):      # when all is durable, tails are cleared
            await self._until_quiet()
            durable: asyncio.Future[OSError | None] = self._loop.create_future()
            committer.commit(durable.set_result)
            await durable
        self._committer = None
        if committer.failure is None:
            committer.finish(mountstate.put_away(session.fs, int(time.time())))

    async def _until_quiet(self) -> None:
        """Until no work is left that nobody waits for."""
        while self._background:
            self._quiet = self._loop.create_future()
            await self._quiet

    def _shut_down(self, _request: Request | None, reply: Shutdown) -> None:
        """Refuse everything, and let nothing reach the device any more, once it has what it shall have."""
        committer = self._committer
        assert committer is not None

        def told(_failure: OSError | None) -> None:
            committer.failure = committer.failure or OSError(errno.EIO, "the file system was shut down")
            self._session.shut = True
            self._turn_read_only()
            self._write(reply.reply)

        told(None) if reply.at_once else committer.commit(told)

    def _answer_finally(self, _request: Request | None, reply: Final) -> None:
        self._last = asyncio.ensure_future(self._answer_last(reply))

    async def _answer_last(self, reply: Final) -> None:
        """DESTROY: the kernel's unmount returns when it is answered, so everything is done before."""
        await self._put_away_or_tell()
        self._write((reply.reply,))
        self._resume()

    async def _put_away_or_tell(self) -> None:
        try:
            await self._put_away()
        except OSError as error:
            log.error("not_put_away", error=str(error), consequence="the next mount replays the journal")

    def _found_corrupt(self, error: Corrupt) -> None:
        """Note it on the disk, before the reply: whoever hears of it meets what follows.  From any thread."""
        if self._on_error is not None and threading.get_ident() == self._home:
            self._on_error.found(error)
        elif self._on_error is not None:
            self._post(self._on_error.found, error)

    def _turn_read_only(self, _failure: OSError | None = None) -> None:
        self._session.read_only = True
        self._choose_rows()

    def _choose_rows(self) -> None:
        session = self._session
        self._rows = ops.shut_table(ops.ROWS) if session.shut \
            else ops.table(ops.ROWS, session.read_only, session.mounted)

    def remounted(self, mounted: MountFlags) -> None:
        """The kernel has the file system mounted in another way now (``remount``).  From any thread."""
        self._post(self._follow, mounted)

    def _follow(self, mounted: MountFlags) -> None:
        self._session.mounted = mounted
        self._choose_rows()
        self._report.remounted(self._session)
        if self._committer is not None:
            self._committer.rest(mounted.read_only)

    def stop(self) -> None:
        """Have ``serve`` return; requests that wait are left to the kernel, which ends them with the connection."""
        if not self._ended.done():
            self._ended.set_result(None)

    def answer_first(self, message: bytes) -> None:
        """Answer INIT before the loop runs.  ``ProtocolError`` if it cannot be served."""
        if self._wirelog is not None:
            self._wirelog.request(message)
        try:
            self._answer_init(wire.decode(memoryview(message), len(message)))
        except wire.Refused as refusal:
            self._write((refusal.reply,))
            raise

    def _answer_init(self, request: Request) -> None:
        self._finish(request, self._row_of(request.opcode).handler(self._session, request))
        agreed = self._session.negotiated
        if agreed is not None:
            self._shapes = wire.shapes_for(agreed.flags)
            if self._wirelog is not None:
                self._wirelog.negotiated(agreed.flags)

    def _pause(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._fd)
            self._reading = False

    def _resume(self) -> None:
        if not self._reading and not self._ended.done():
            self._loop.add_reader(self._fd, self._drain)
            self._reading = True

    def _drain(self) -> None:
        """Serve what has arrived, a bounded number of requests."""
        hopeful = len(self._hopeful)
        turns, linger = DRAIN_MOST, LINGER_TRIES
        while turns:
            turns -= 1
            try:
                length = os.readv(self._fd, self._buffers)
            except BlockingIOError:
                if linger and turns + 1 < DRAIN_MOST:   # whoever has got a reply often asks again at once
                    turns, linger = turns + 1, linger - 1
                    continue
                self._try_hopeful(len(self._hopeful))
                return
            except OSError as error:
                if error.errno in _AGAIN:
                    continue
                self._lost(error)
                return
            if not length:  # the other end of a socket was closed
                self.stop()
                return
            self._serve(length)
            if self._committer is not None:
                self._tidy_up()
            if len(self._waiting) >= WAITING_MOST:
                self._pause()
                hopeful = len(self._hopeful)
                break
        self._try_hopeful(hopeful)
        if self._hopeful and self._reading:     # nothing else may arrive
            self._loop.call_soon(self._drain)

    def _try_hopeful(self, count: int) -> None:
        """Run the first steps again that found no room, unless something is being freed (V7)."""
        for waiter in self._hopeful.take(0 if self._background else count):
            self._resume_step(waiter)

    def _lost(self, error: OSError) -> None:
        if error.errno not in _GONE:
            log.error("fuse_device_failed", error=str(error))
        self.stop()

    def _serve(self, length: int) -> None:
        if self._wirelog is not None:
            self._wirelog.request(self._view[:length])
        try:
            request = wire.decode(self._view, length, self._shapes)
        except ProtocolError as error:
            self._refuse_malformed(error)
            return
        self._attempt(request, self._run if request.opcode != _INIT else self._answer_init, request)

    def _attempt(self, request: Request | None, step: Callable[..., None], *arguments: Any) -> None:
        """Do a step of a request (or of several: None); whatever it raises becomes the reply.  From any thread."""
        try:
            step(*arguments)
        except Exception as error:
            if arguments and type(arguments[0]) is Waiter and request is None:
                self._leave(None)
            self._refuse(request, error)

    def _run(self, request: Request) -> None:
        """Run the row; if something is missing that has to be waited for, leave the request waiting."""
        handler = self._row_of(request.opcode).handler
        try:
            reply = handler(self._session, request)
        except (BlockMiss, CommitFirst) as miss:
            self._wait(self._waiter_of(request), miss)
            return
        except Refused as refusal:
            writing = self._session.fs.writing
            if refusal.errno != errno.ENOSPC or writing is None or not writing.orphans:
                raise
            self._waiting[request.unique] = waiter = self._waiter_of(request)
            self._hopeful.append(waiter)
            return
        self._finish(request, reply)

    def _waiter_of(self, request: Request, again: Step | None = None) -> Waiter:
        """What runs a request from the top, or from the step ``again``."""
        request = request.detach()
        return Waiter(request, again or partial(self._row_of(request.opcode).handler, self._session, request))

    def _take_step(self, request: Request | None, step: Step) -> None:
        """Take a further step of a request, or work that nobody has asked for."""
        try:
            reply = step()
        except (BlockMiss, CommitFirst) as miss:
            self._wait(Waiter(request, step), miss)
            return
        self._finish(request, reply)

    def _wait(self, waiter: Waiter, miss: BlockMiss | CommitFirst) -> None:
        if waiter.request is not None:
            self._waiting[waiter.request.unique] = waiter
        else:
            self._background += 1
        self._run_again(waiter, miss)

    def _run_again(self, waiter: Waiter, miss: BlockMiss | CommitFirst) -> None:
        """Fetch what is missing and take the step again, until the reply is made or has to wait."""
        request = waiter.request
        if self._closing and request is not None:
            raise OSError(errno.ESHUTDOWN, "the file system is being put away")
        for _ in range(INLINE_ATTEMPTS):
            waiter.attempts += 1
            if waiter.attempts > ATTEMPTS_MOST:
                raise Starved(f"{waiter.attempts} runs")
            if isinstance(miss, CommitFirst):
                self._commit_first(waiter)
                return
            if self._fetcher.fetch(waiter, miss.runs):
                return
            try:
                reply = waiter.step()
            except (BlockMiss, CommitFirst) as further:
                miss = further
                continue
            self._leave(request)
            self._finish(request, reply)
            return
        self._loop.call_soon(self._attempt, request, self._run_again, waiter, miss)

    def _leave(self, request: Request | None) -> None:
        """A step that waited has ended."""
        if request is not None:
            self._take(request.unique)
            return
        self._background -= 1
        if not self._background and self._hopeful:
            self._loop.call_soon(self._try_hopeful, len(self._hopeful))
        if not self._background and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    def _row_of(self, opcode: int) -> Op:
        return self._rows.get(opcode, ops.UNKNOWN)

    def _finish(self, request: Request | None, reply: ops.Reply) -> None:
        """Send what a handler returned, or do what it asks for first."""
        if type(reply) is bytes:
            self._write((reply,))
        elif type(reply) is tuple:
            self._write(reply)
        elif reply is not None:
            self._carriers[type(reply)](request, reply)

    def _write_data(self, request: Request | None, plan: WritePlan) -> None:
        """Write and take the next step, with nothing in between (V6); if that has to wait, start over."""
        committer = self._committer
        if self._session.read_only and (request is not None or committer is None or committer.failure is not None):
            raise Refused(errno.EROFS)
        for address, pieces in plan.writes:
            self._device.write(address, pieces)
            self._stream.add(address, sum(map(len, pieces)))
        try:
            reply = plan.then()
        except (BlockMiss, CommitFirst) as miss:
            waiter = Waiter(None, plan.again or plan.then) if request is None else self._waiter_of(request, plan.again)
            self._wait(waiter, miss)
            return
        self._finish(request, reply)

    def _send_when_durable(self, request: Request, reply: Durable) -> None:
        """Answer once all that was done until now is on the device, or with why it is not."""
        assert self._committer is not None
        self._waiting[request.unique] = Waiter(request, lambda: None)

        def answer() -> None:
            if self._take(request.unique):
                self._write((reply.reply,))

        def told(failure: OSError | None) -> None:
            if failure is None:
                answer()
            else:
                self._refuse(request, failure)

        self._committer.commit(told, reply.only_data, None if reply.settled else answer)

    def _commit_first(self, waiter: Waiter) -> None:
        """Take the step again once the open batch is durable."""
        if self._committer is None:
            raise Starved("a change without a journal to take it")
        writing = self._session.fs.writing
        if self._held_back and writing is not None and writing.batch.is_empty:
            self._parked.append(waiter)
            return

        def told(failure: OSError | None) -> None:
            if failure is None:
                self._loop.call_soon(self._resume_step, waiter)  # what it waits for may come with the next event
            else:
                self._leave(waiter.request)
                self._refuse(waiter.request, failure)

        self._committer.commit(told)

    def _resume_step(self, waiter: Waiter) -> None:
        """Go on with a step that has what it waited for."""
        self._attempt(waiter.request, self._run_again, waiter, BlockMiss(()))

    def _tidy_up(self) -> None:
        """After requests were served: free what nobody uses any more, and send off a batch that has grown large."""
        session, committer = self._session, self._committer
        if session.outdated:
            self._tell_outdated()
        while session.unused:
            number = session.unused.pop()
            self._attempt(None, self._take_step, None, partial(housekeeping.release, session, number))
        if committer is not None:
            committer.send_if_large()

    def _tell_outdated(self) -> None:
        """Have the kernel ask for attributes anew, of each file once in a second: for whoever appends it is slow."""
        for number in self._session.outdated - self._told:
            self._write(wire.notify_inval_inode(node_of(number), -1))
            self._told.add(number)
            self._session.outdated.discard(number)

    def _tick(self) -> None:
        if self._committer is None or self._ended.done():
            return
        self._told.clear()
        self._tell_outdated()
        self._committer.tick()
        self._loop.call_later(TICK_SECONDS, self._tick)

    # --- File data ----------------------------------------------------------------------------------------------------

    def _send_data(self, request: Request, plan: Plan) -> None:
        """Answer with file data: at once if they are resident, else from a worker thread."""
        if not plan.segments and plan.verify is None:
            self._write(wire.reply_data(request.unique, fileio.ZEROES[plan.reply]))
        elif fileio.fill_now(self._device, plan, self._buffer):
            self._write(wire.reply_data(request.unique, self._buffer[plan.reply]))
        else:
            self._waiting[request.unique] = Waiter(request, lambda: None)
            if self._committer is not None:
                self._plans.add(request.unique)
            self._workers.submit(lambda buffer: self._attempt(request, self._send_from_thread, request, plan, buffer))

    def _send_from_thread(self, request: Request, plan: Plan, buffer: memoryview) -> None:
        try:
            fileio.fill(self._device, plan, buffer)
        finally:
            if self._committer is not None:
                self._post(self._plan_ended, request.unique)
        self._take(request.unique)
        self._write(wire.reply_data(request.unique, buffer[plan.reply]))

    def _read_for(self, request: Request, reply: ReadPlan) -> None:
        """Take the step that needs data, with what is resident, or with what a worker thread reads."""
        length = reply.plan.length
        if fileio.fill_now(self._device, reply.plan, self._buffer):
            self._take_step(request, partial(reply.then, memoryview(bytes(self._buffer[:length]))))
            return
        self._waiting[request.unique] = Waiter(request, lambda: None)
        self._plans.add(request.unique)
        self._workers.submit(lambda buffer: self._attempt(request, self._read_in_thread, request, reply, buffer))

    def _read_in_thread(self, request: Request, reply: ReadPlan, buffer: memoryview) -> None:
        try:
            fileio.fill(self._device, reply.plan, buffer)
        finally:
            self._post(self._plan_ended, request.unique)
        step = partial(reply.then, memoryview(bytes(buffer[:reply.plan.length])))
        self._take(request.unique)
        self._post(self._attempt, request, self._take_step, request, step)

    def _discard(self, request: Request | None, reply: DiscardPlan) -> None:
        for address, length in reply.ranges:
            self._device.discard(address, length)
        self._loop.call_soon(self._attempt, request, self._take_step, request, reply.then)

    def _have_written_back(self, request: Request, reply: WrittenBack) -> None:
        """Take the step once the kernel has sent its dirty pages of a file as WRITEs (and dropped all of its pages)."""
        def ask(_buffer: memoryview) -> None:
            with contextlib.suppress(OSError):
                os.writev(self._fd, wire.notify_inval_inode(reply.node, reply.offset))
            self._take(request.unique)
            self._post(self._attempt, request, self._take_step, request, reply.then)

        self._waiting[request.unique] = Waiter(request, lambda: None)
        self._asker.submit(ask)

    def _allow_reuse(self, closed: ClosedBatch) -> None:
        """What a durable batch freed may be used again, once no READ under way can look there any more (V5)."""
        if self._plans:
            self._held_back.append((closed, set(self._plans)))
        else:
            self._reuse(closed)

    def _reuse(self, closed: ClosedBatch) -> None:
        for number in commit.durable(self._session.fs, closed):
            self._attempt(None, self._take_step, None, partial(housekeeping.clear_tail, self._session, number))

    def _plan_ended(self, unique: int) -> None:
        self._plans.discard(unique)
        for _, plans in self._held_back:
            plans.discard(unique)
        while self._held_back and not self._held_back[0][1]:
            self._reuse(self._held_back.pop(0)[0])
        parked, self._parked = self._parked, []
        for waiter in parked:
            self._resume_step(waiter)

    def _take(self, unique: int) -> bool:
        """The request waits no longer: whether it did.  From any thread."""
        found = self._waiting.pop(unique, None) is not None
        if found and not self._reading:
            self._post(self._resume)
        return found

    def _post(self, step: Callable[..., None], *arguments: Any) -> None:
        """Have the loop's thread do a step soon.  From any thread; nothing happens once the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(step, *arguments)

    # --- Replies ------------------------------------------------------------------------------------------------------

    def _write(self, pieces: Pieces) -> None:
        """Write one reply, from any thread; with a wire log, which has no lock, from the loop's."""
        if self._wirelog is not None:
            if self._home and self._home != threading.get_ident():
                self._post(self._write, tuple(map(bytes, pieces)))
                return
            self._wirelog.reply(*pieces)
        try:
            os.writev(self._fd, pieces)
        except OSError as error:
            # ENOENT: the request is gone, its caller was killed.  Gone connections are noticed by the reader.
            if error.errno not in _GONE and error.errno != errno.ENOENT:
                self._report.bounded("reply_rejected", error=str(error), reply=bytes(pieces[0]).hex())

    def _refuse(self, request: Request | None, error: Exception) -> None:
        """Answer with the error that an exception stands for, and log what is not an ordinary answer."""
        opcode, node = (request.opcode, request.nodeid) if request is not None else (0, 0)
        try:
            self._report.error(error, ops.name_of(opcode), node)
        finally:
            if request is not None:
                self._take(request.unique)
                if isinstance(error, wire.Refused):
                    self._write((error.reply,))
                elif self._row_of(opcode).replies:
                    self._write((wire.reply_error(request.unique, errno_of(error)),))

    def _refuse_malformed(self, error: ProtocolError) -> None:
        self._report.bounded("malformed_request", error=str(error), opcode=ops.name_of(error.opcode))
        if error.unique and self._row_of(error.opcode).replies:
            self._write((wire.reply_error(error.unique, errno.EIO),))
