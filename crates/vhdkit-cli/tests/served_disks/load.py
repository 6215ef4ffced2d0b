"""Puts a load on a disk through libnbd until its server is killed, and judges what is there when it is back.

    load.py SOCKET STATE SEED UNIT TASK

SOCKET  Unix socket of the server
STATE   file that remembers between the runs what each unit of the disk may hold
SEED    of the operations
UNIT    bytes of a sector: what a unit holds is a number, again and again
TASK    load: judges, then writes until the server is gone
        fill: judges, writes for a while, flushes
        judge: judges

What is acknowledged before a flush is sent that is acknowledged has to be there, and what is acknowledged with FUA.
Of everything later, any unit may be there or not.
"""

import json
import os
import random
import select
import sys

import nbd

SOCKET, STATE, SEED, UNIT, TASK = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
BLOCK_UNITS = (1 << 20) // UNIT
DEPTH = 16
# Of all changes, how many are writes, and how many are writes or zeros; the others are trims.
WRITES, ZEROES = 0.9, 0.95
# Errors of a connection whose other end is gone.
GONE = ("ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN")


class Unit:
    """What one unit may hold: what is durable, and what was sent since, in order."""

    def __init__(self, durable):
        self.durable = durable
        self.later = []  # (number of the operation, value, whether it is certain)

    def settle(self, number):
        """Makes everything up to this operation durable."""
        while self.later and self.later[0][0] <= number:
            _, value, certain = self.later.pop(0)
            self.durable = {value} if certain else self.durable | {value}

    def may_hold(self):
        return self.durable | {value for _, value, _ in self.later}


class Disk:
    """The model of the disk. A value of a unit is the number of an operation, and zero for zeros."""

    def __init__(self):
        self.units = {}
        self.number = 0
        if os.path.exists(STATE):
            with open(STATE) as file:
                state = json.load(file)
            self.number = state["number"]
            self.units = {int(index): Unit(set(values)) for index, values in state["units"].items()}

    def save(self):
        units = {index: sorted(unit.may_hold()) for index, unit in self.units.items()}
        with open(STATE, "w") as file:
            json.dump({"number": self.number, "units": units}, file)

    def send(self, units, value, certain=True):
        """An operation goes out; gives its number."""
        self.number += 1
        for index in units:
            unit = self.units.setdefault(index, Unit({0}))
            unit.later.append((self.number, self.number if value is None else value, certain))
        return self.number

    def settle(self, units, number):
        for index in units:
            self.units[index].settle(number)

    def judge(self, handle):
        """Reads everything. What a unit holds now it will hold from now on, as the flush after this says."""
        wrong = []
        known = {index - index % BLOCK_UNITS for index in self.units}
        for start in range(0, handle.get_size(), 1 << 20):
            length = min(1 << 20, handle.get_size() - start)
            data = handle.pread(length, start)
            if start // UNIT not in known and data == bytes(length):
                continue
            for offset in range(0, length, UNIT):
                self.judge_unit((start + offset) // UNIT, data[offset : offset + UNIT], wrong)
        if wrong:
            sys.exit(f"{len(wrong)} units are wrong; the first: " + "; ".join(wrong[:10]))
        if not handle.is_read_only():
            handle.flush()

    def judge_unit(self, index, data, wrong):
        value = int.from_bytes(data[:4], "little")
        expected = stamp(index, value)
        unit = self.units.get(index)
        may = unit.may_hold() if unit else {0}
        if data != expected:
            wrong.append(f"unit {index} holds pieces, or another unit's bytes: {data[:16].hex()}...")
        elif value not in may:
            wrong.append(f"unit {index} holds {value}, may hold {sorted(may)}")
        elif unit:
            unit.durable, unit.later = {value}, []


def stamp(index, value):
    """The bytes of a unit: zeros, or a value and where it belongs."""
    if value == 0:
        return bytes(UNIT)
    return (value.to_bytes(4, "little") + index.to_bytes(4, "little")) * (UNIT // 8)


class Load:
    """Operations in flight on one or more connections."""

    def __init__(self, disk, handles):
        self.disk = disk
        self.handles = handles
        self.rng = random.Random(SEED)
        self.size_units = handles[0].get_size() // UNIT
        self.blocks = self.size_units // BLOCK_UNITS
        self.hot = [self.rng.randrange(self.blocks) for _ in range(6)]
        # As a write that is synced syncs what came before it, there are runs without any.
        self.fua_chance = self.rng.choice([0, 0, 0.01, 0.1])
        self.in_flight = {}  # number: units
        self.acknowledged = []  # (units, number) since the last flush that was sent
        self.writes = self.flushes = self.waiting = 0
        self.gone = False

    def block(self):
        """A block, mostly one of few. These change, so that there are always new blocks to allocate."""
        if self.rng.random() < 0.02:
            self.hot[self.rng.randrange(len(self.hot))] = self.rng.randrange(self.blocks)
        return self.rng.choice(self.hot) if self.rng.random() < 0.8 else self.rng.randrange(self.blocks)

    def range(self):
        """A range of units: mostly few of them, some across the edge of a block."""
        block = self.block()
        edge = block * BLOCK_UNITS
        kind = self.rng.random()
        if kind < 0.1 and block > 0:
            return range(edge - self.rng.randint(1, 9), edge + self.rng.randint(1, 9))
        start = edge + self.rng.randrange(BLOCK_UNITS)
        count = self.rng.randint(1, 200 if kind < 0.2 else 12)
        return range(start, min(start + count, self.size_units))

    def whole_block(self):
        start = self.block() * BLOCK_UNITS
        return range(start, start + BLOCK_UNITS)

    def finished(self, number, units, fua, error):
        self.waiting -= 1
        self.in_flight.pop(number, None)
        if error.value != 0:
            self.failed(error.value)
        elif fua:
            self.disk.settle(units, number)
        else:
            self.acknowledged.append((units, number))
        self.writes += error.value == 0
        return 1

    def flushed(self, batch, error):
        self.waiting -= 1
        if error.value != 0:
            self.failed(error.value)
            return 1
        for units, number in batch:
            self.disk.settle(units, number)
        self.flushes += 1
        return 1

    def failed(self, value):
        import errno

        name = errno.errorcode.get(value, str(value))
        if name not in GONE:
            print(f"an operation failed: {name}", file=sys.stderr, flush=True)
            os._exit(1)
        self.gone = True

    def flush(self, handle):
        batch, self.acknowledged = self.acknowledged, []
        self.waiting += 1
        handle.aio_flush(completion=lambda error: self.flushed(batch, error))

    def change(self, handle):
        """Sends a write, zeros or a trim, unless it would touch what is in flight."""
        kind = self.rng.random()
        whole = kind >= WRITES
        units = self.whole_block() if whole else self.range()
        if any(units.start < other.stop and other.start < units.stop for other in self.in_flight.values()):
            return
        fua = self.rng.random() < self.fua_chance
        number = self.disk.send(units, None if kind < WRITES else 0, kind < ZEROES)
        self.in_flight[number] = units
        self.waiting += 1
        done = lambda error: self.finished(number, units, fua, error)
        offset, length = units.start * UNIT, len(units) * UNIT
        flags = nbd.CMD_FLAG_FUA if fua else 0
        if kind < WRITES:
            data = bytearray().join(stamp(index, number) for index in units)
            handle.aio_pwrite(nbd.Buffer.from_bytearray(data), offset, completion=done, flags=flags)
        elif kind < ZEROES:
            flags |= self.rng.choice([0, nbd.CMD_FLAG_NO_HOLE])
            handle.aio_zero(length, offset, completion=done, flags=flags)
        else:
            handle.aio_trim(length, offset, completion=done, flags=flags)

    def lost(self, handle):
        """Whether the server has gone: such a handle takes no command any more."""
        return handle.aio_is_dead() or handle.aio_is_closed()

    def step(self):
        handle = self.rng.choice(self.handles)
        if self.lost(handle):
            self.gone = True
            return
        if self.rng.random() < 0.06:
            self.flush(handle)
        else:
            self.change(handle)

    def wait(self):
        """Lets the connections move."""
        if any(self.lost(handle) for handle in self.handles):
            self.gone = True
            return
        poll = select.poll()
        for handle in self.handles:
            direction = handle.aio_get_direction()
            events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            events |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            poll.register(handle.aio_get_fd(), events)
        ready = dict(poll.poll(1000))
        for handle in self.handles:
            events = ready.get(handle.aio_get_fd(), 0)
            direction = handle.aio_get_direction()
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
                handle.aio_notify_read()
            elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                handle.aio_notify_write()

    def run(self, operations):
        """Sends so many operations, or until the server is gone."""
        left = operations
        try:
            while not self.gone and (left > 0 or self.waiting > 0):
                if left > 0 and self.waiting < DEPTH:
                    self.step()
                    left -= 1
                else:
                    self.wait()
        except nbd.Error as error:
            if error.errno not in GONE:
                raise


def connect():
    handle = nbd.NBD()
    handle.connect_unix(SOCKET)
    return handle


def main():
    disk = Disk()
    first = connect()
    disk.judge(first)
    if TASK != "judge":
        handles = [first] + ([connect()] if first.can_multi_conn() else [])
        load = Load(disk, handles)
        print("loading", flush=True)
        load.run(600 if TASK == "fill" else 1 << 60)
        if TASK == "fill":
            first.flush()
            disk.judge(first)
        print(f"{load.writes} changes and {load.flushes} flushes acknowledged, {len(handles)} connections")
    disk.save()
    if TASK != "load":
        first.shutdown()


main()
