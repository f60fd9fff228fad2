# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked: the rows of the table, with the limits that must be kept and those that are aimed at."""

from __future__ import annotations

from .results import Row, Source

THIRD, SIXTH = 1 / 3, 1 / 6


def _both(  # noqa: PLR0917  columns of a table
    name: str,
    group: str,
    what: str,
    unit: str,
    step: str,
    value: str,
    *,
    ours: str = "ctsyncd",
    theirs: str = "conntrackd",
    must: float | None = None,
    aim: float | None = None,
    scale: float = 1.0,
) -> Row:
    """A ratio of the same value of the same step."""
    return Row(name, group, what, unit, Source(ours, step, value), Source(theirs, step, value), must, aim, False, scale)


def _alone(  # noqa: PLR0917  columns of a table
    name: str,
    group: str,
    what: str,
    unit: str,
    step: str,
    value: str,
    *,
    ours: str = "ctsyncd",
    must: float | None = None,
    aim: float | None = None,
    scale: float = 1.0,
) -> Row:
    """A number of ours that is judged by itself."""
    return Row(name, group, what, unit, Source(ours, step, value), None, must, aim, False, scale)


CPU = "CPU, real TCP connections"
FLOOD = "CPU, injected flows"
WIRE = "Sync link"
MEMORY = "Memory"
COMMIT = "Commit, take-over, resync"
LATENCY = "Latency of a new flow, and loss"
BOX = "The box"

PER_CONNECTION = "µs/connection"
PER_FLOW = "µs/flow"
MIB = 1 / (1 << 20)

ROWS = (
    _both("active-2000", CPU, "active, 2000/s", PER_CONNECTION, "real-2000", "active_us", must=THIRD, aim=SIXTH),
    _both(
        *("active-2000-snat", CPU, "active, 2000/s, SNAT", PER_CONNECTION, "real-2000-snat", "active_us"),
        must=THIRD,
        aim=SIXTH,
    ),
    _both(
        *("active-2000-tuned", CPU, "active, 2000/s, conntrackd tuned", PER_CONNECTION, "real-2000", "active_us"),
        theirs="conntrackd-tuned",
        must=1 / 2,
        aim=THIRD,
    ),
    _both("active-200", CPU, "active, 200/s, SNAT", PER_CONNECTION, "real-200", "active_us", must=1, aim=THIRD),
    _both("backup-200", CPU, "backup, 200/s, SNAT", PER_CONNECTION, "real-200", "backup_us", must=1, aim=THIRD),
    _both(
        *("backup-200-cache", CPU, "backup, 200/s, SNAT, external cache", PER_CONNECTION, "real-200", "backup_us"),
        ours="ctsyncd-cache",
        must=1,
        aim=THIRD,
    ),
    _both(
        *("active-200-tuned", CPU, "active, 200/s, SNAT, conntrackd tuned", PER_CONNECTION, "real-200", "active_us"),
        theirs="conntrackd-tuned",
    ),
    _both(
        *("backup-2000-cache", CPU, "backup, 2000/s, external cache", PER_CONNECTION, "real-2000", "backup_us"),
        ours="ctsyncd-cache",
        must=THIRD,
        aim=SIXTH,
    ),
    _both(
        *("backup-2000-hot", CPU, "backup, 2000/s, hot standby; conntrackd: DisableExternalCache On"),
        *(PER_CONNECTION, "real-2000", "backup_us"),
        theirs="conntrackd-direct",
        must=THIRD,
        aim=1 / 5,
    ),
    _both(
        *("backup-2000-unlike", CPU, "backup, 2000/s, ours hot standby, theirs external cache (less work)"),
        *(PER_CONNECTION, "real-2000", "backup_us"),
    ),
    _both("active-held", CPU, "active, 2000/s, SNAT, held for 100 ms", PER_CONNECTION, "real-2000-held", "active_us"),
    _alone("idle-active", CPU, "idle, active", "% of a core", "idle", "active_percent", must=0.2, aim=0.05),
    _alone("idle-backup", CPU, "idle, backup", "% of a core", "idle", "backup_percent", must=0.2, aim=0.05),
    _both("idle-ratio", CPU, "idle, active", "% of a core", "idle", "active_percent"),
    *(
        _both(
            f"flood-{shape}",
            FLOOD,
            f"active, flood, {shape}",
            PER_FLOW,
            f"flood-{shape}",
            "active_us",
            must=1 / 2,
            aim=THIRD,
        )
        for shape in ("transit", "site", "snat")
    ),
    _both("delete", FLOOD, "active, flood of deletes", PER_FLOW, "delete", "active_us"),
    _both("steady", FLOOD, "active, steady 20,000/s", PER_FLOW, "steady", "active_us"),
    _both(
        *("flood-backup-cache", FLOOD, "backup, flood, external cache", PER_FLOW, "flood-transit", "backup_us"),
        ours="ctsyncd-cache",
    ),
    _both(
        *("flood-backup-hot", FLOOD, "backup, flood, hot standby; conntrackd: DisableExternalCache On"),
        *(PER_FLOW, "flood-transit", "backup_us"),
        theirs="conntrackd-direct",
    ),
    _both("wire-2000", WIRE, "per connection, 2000/s", "bytes", "real-2000", "bytes", must=1 / 10, aim=1 / 15),
    _both(
        "wire-2000-snat",
        WIRE,
        "per connection, 2000/s, SNAT",
        "bytes",
        "real-2000-snat",
        "bytes",
        must=1 / 10,
        aim=1 / 15,
    ),
    _both("wire-held", WIRE, "per connection, 2000/s, SNAT, held for 100 ms", "bytes", "real-2000-held", "bytes"),
    _both("wire-200", WIRE, "per connection, 200/s, SNAT (heartbeats included)", "bytes", "real-200", "bytes"),
    *(
        _both(
            f"wire-{shape}",
            WIRE,
            f"per random new flow, {shape}",
            "bytes",
            f"flood-{shape}",
            "bytes",
            must=1 / 5,
            aim=1 / 8,
        )
        for shape in ("transit", "site", "snat")
    ),
    _both("wire-idle", WIRE, "idle", "bytes/s", "idle", "bytes_per_s"),
    *(
        _both(
            f"memory-{node}-{short}",
            MEMORY,
            f"{node}, per flow, {said}",
            "bytes",
            "flood-transit",
            f"{node}_rss_per_flow",
            ours=variant,
            must=1 / 2,
            aim=1 / 4,
        )
        for variant, short, said in (("ctsyncd", "hot", "hot standby"), ("ctsyncd-cache", "cache", "external cache"))
        for node in ("active", "backup")
    ),
    *(
        _alone(
            f"start-{node}", MEMORY, f"{node}, at the start", "MiB", "flood-transit", f"{node}_rss", must=40, scale=MIB
        )
        for node in ("active", "backup")
    ),
    *(
        _both(
            f"memory-{node}-{short}-1000000",
            MEMORY,
            f"{node}, per flow of 1,000,000, {said}",
            "bytes",
            "growth-1000000",
            f"{node}_rss_per_flow",
            ours=variant,
            must=1 / 2,
            aim=1 / 4,
        )
        for variant, short, said in (("ctsyncd", "hot", "hot standby"), ("ctsyncd-cache", "cache", "external cache"))
        for node in ("active", "backup")
    ),
    *(
        row
        for size, said in (("100000", "100,000"), ("1000000", "1,000,000"))
        for row in (
            _both(
                *(
                    f"commit-{size}",
                    COMMIT,
                    f"commit of {said} (classic mode)",
                    "ms/1000 flows",
                    f"commit-{size}",
                    "ms_per_1000",
                ),
                ours="ctsyncd-cache",
                must=0.6,
                aim=0.4,
            ),
            _both(
                *(f"resync-{size}", COMMIT, f"full resync of {said}, time", "s", f"resync-{size}", "seconds"),
                ours="ctsyncd-cache",
                must=2,
                aim=1,
            ),
            _both(
                *(f"resync-cpu-{size}", COMMIT, f"full resync of {said}, CPU of both", "s", f"resync-{size}", "cpu_s"),
                ours="ctsyncd-cache",
                must=2,
                aim=1,
            ),
        )
    ),
    *(
        _alone(
            *(f"resync-missing-{variant}-{size}", COMMIT, f"{variant}: flows missing after a full resync of {said}"),
            *("flows", f"resync-{size}", "missing"),
            ours=variant,
        )
        for size, said in (("100000", "100,000"), ("1000000", "1,000,000"))
        for variant in ("ctsyncd-cache", "conntrackd")
    ),
    _alone("take-over", COMMIT, "take-over, hot standby: entries inserted", "entries", "take-over", "inserted", must=0),
    Row(
        *("box", BOX, "connections forwarded, of those without a daemon", "connections/s"),
        Source("ctsyncd", "box", "rate"),
        Source("none", "box", "rate"),
        0.9,
        0.97,
        above=True,
    ),
    Row(
        *("box-conntrackd", BOX, "the same for conntrackd (for comparison)", "connections/s"),
        Source("conntrackd", "box", "rate"),
        Source("none", "box", "rate"),
    ),
    Row(
        *("box-listener", BOX, "the same with a listener that does nothing: the least that replication costs"),
        "connections/s",
        Source("listener", "box", "rate"),
        Source("none", "box", "rate"),
    ),
    _alone("latency-idle-p50", LATENCY, "idle, p50", "ms", "latency-idle", "kernel_p50_ms", must=1, aim=0.5),
    _alone("latency-idle-p99", LATENCY, "idle, p99", "ms", "latency-idle", "kernel_p99_ms", must=4, aim=1.5),
    _alone("latency-load-p50", LATENCY, "at 20,000/s, p50", "ms", "latency-load", "kernel_p50_ms"),
    _alone("latency-load-p99", LATENCY, "at 20,000/s, p99", "ms", "latency-load", "kernel_p99_ms", must=6, aim=3),
    *(
        Row(
            f"latency-{load}-{part}-wire",
            LATENCY,
            f"{said}, {part}; ours until the kernel has it, theirs (FTFW) only until it is on the wire",
            "ms",
            Source("ctsyncd", f"latency-{load}", f"kernel_{part}_ms"),
            Source("conntrackd", f"latency-{load}", f"wire_{part}_ms"),
        )
        for load, said in (("idle", "idle"), ("load", "at 20,000/s"))
        for part in ("p50", "p99")
    ),
    *(
        _both(
            f"latency-{load}-{part}-ratio",
            LATENCY,
            f"{said}, {part}; conntrackd: DisableExternalCache On",
            "ms",
            f"latency-{load}",
            f"kernel_{part}_ms",
            theirs="conntrackd-direct",
        )
        for load, said in (("idle", "idle"), ("load", "at 20,000/s"))
        for part in ("p50", "p99")
    ),
    *(
        _alone(
            f"lost-{shape}",
            LATENCY,
            f"flows the backup does not know after a flood, {shape}",
            "flows",
            f"flood-{shape}",
            "missing",
            must=0,
        )
        for shape in ("transit", "snat")
    ),
    _alone(
        "overruns", LATENCY, "overruns of the event socket in a flood", "overruns", "flood-transit", "overruns", must=0
    ),
)

# Paragraphs for the report, by row: what was tried where an aim is missed, or why a comparison is what it is.
NOTES: dict[str, str] = {
    "active-2000-tuned": (
        "A longer window (10, 20, 30 ms) and leaving CLOSE_WAIT and LAST_ACK in the kernel (FIN_WAIT and the end "
        "are told) brought the most. FIN_WAIT could be left there, too; but then a backup that takes over would "
        "hold closing connections for established, for days. conntrackd's tuned filter replicates no end of a "
        "connection at all."
    ),
    "backup-200": (
        "The number of wake-ups decides: one datagram for each window, its acknowledgement sent in the same wake- "
        "up, one batch for the kernel. What is left is some hundred microseconds per wake-up of Python on cold "
        "caches, and two requests per connection to the kernel; conntrackd only stores the flow in its memory "
        "here, which is less."
    ),
    "idle-active": (
        "An idle daemon wakes up twice for each heartbeat (it sends its own, the answer comes) and its peer once; "
        "status, watchdog, track file and address checks ride on these. Two programs that do nothing but that (one "
        "sends 100 bytes twice a second, the other one answers, nothing is sealed or looked at) take 0.042 and 0.025 "
        "% already: the rest of the aim would be 20 microseconds of Python for each wake-up. Of our 1.2 ms in a "
        "second, measured part by part where the daemon runs, 0.66 are two heartbeats (of one, 0.09 until it is "
        "sealed, 0.07 for OpenSSL, 0.13 in the kernel, which delivers it and wakes the peer in the same call), 0.26 "
        "their two answers, the rest the wake-ups themselves and what else is looked at. Every wake-up finds the "
        "processor's caches cold, so what counts is how many different lines run, at about a microsecond each: they "
        "were 2220 in a second (1950 on the backup), and are 900 (800). A heartbeat that says what the one before "
        "said is put together and taken apart as a piece of bytes. Links are waited for in one call, not two. What "
        "a second brings is cut to what may have changed, is done every two seconds while nothing happens, and a "
        "poll of the engine every ten. Before that the AES-GCM of python3-cryptography before version 42 was the "
        "largest part: OpenSSL's context is kept now, which takes a third of it. A heartbeat twice a second instead "
        "of five times, and the peer answering instead of keeping time itself, had divided the wake-ups by four. "
        "Huge pages for Python's memory changed nothing. Fewer heartbeats would notice a dead peer later. To leave "
        "the answer in the socket until the own next heartbeat is due would save one wake-up of two; it was written "
        "and taken out again, because the watch over several links needs answers within 0.1 s, and a change of role "
        "must not wait."
    ),
    "commit-100000": (
        "Nearly all of our time is the kernel's: it makes the entry. It also builds an event for each as long as "
        "anybody listens to new ones, in any namespace of the machine, which costs as much again; so a backup, "
        "and a node that commits, listens to the end of entries only, and the active daemon is dead here as at a "
        "take-over. The command imports next to nothing now and starts in 25 ms instead of 100. With an active "
        "ctsyncd elsewhere on the machine the ratio is 0.8 to 1.0 instead of 0.56."
    ),
    "resync-100000": (
        "To read an entry costs the kernel 3.5 µs before we see it: alone more than all of conntrackd's bulk, "
        "which comes out of its copy of the table. So the active node remembers what it told of each flow, and "
        "tells that again. What is not translated is its key turned round, and many flows have the rest in "
        "common: that costs 10 to 20 bytes a flow, where a copy of each value cost 120. The first bulk after a "
        "take-over or lost events still comes out of the kernel, in 3 to 5 times conntrackd's time. "
        "Acknowledgements every 64 blocks made a sender wait whose window had shrunk to 16; they come every 16 "
        "now."
    ),
    "resync-cpu-100000": (
        "See the time of the resync. Of what is left a good half is the backup's: it opens, checks, decodes and "
        "stores each flow and adds it to its digest; conntrackd compares no tables and seals nothing."
    ),
    "memory-backup-hot": (
        "A replica is a key (48 bytes), a value (64) and its place in a dictionary (30 to 60). What waits for the "
        "kernel used to be copied, and a set that had been full kept its room: both are gone. Values that many "
        "flows share would bring it to 100, for 0.2 µs more per change. The active node's way (leave out a reply "
        "tuple that is the key turned round, share the rest) would save the reply of flows that are not "
        "translated; not tried."
    ),
    "memory-backup-cache": "See the backup in hot standby.",
    "box": (
        "The least is known: a listener whose filter drops every event in the kernel and that never runs left 79 to "
        "93 % of the rate in nearly all of some twenty rounds, most of them below 90; in five rounds by turns, the "
        "most careful look, a median of 86 % where ctsyncd left 79. With somebody in the groups the kernel builds "
        "eight events for a connection, some 20 to 25 µs of the two processors' time (ctnetlink_conntrack_event is 9 "
        "to 11 % of all samples of a profile, ctsyncd on both nodes, its system calls included, 5.5 %), and no "
        "filter keeps it from that: so the tenth that may be lost is gone before a daemon has done anything. What "
        "the daemons add is their own CPU time and next to nothing else: preemption, cold caches and what waits in "
        "the queue did not show beside it. It was 18 to 24 µs per connection (active 12 to 15, backup 6 to 9) and is "
        "10 to 13 (active 9 to 11, backup 1 to 1.5), conntrackd's 180 to 230. With a first form of what follows, "
        "medians of three rounds side by side, that was 0.78 of the rate before and 0.83 after, where the listener "
        "left 0.87; as it is now, in two rounds on a machine that was less quiet, 0.64 and 0.73 before, 0.68 and "
        "0.83 after, the listener 0.80. Of the active node's 3.15 events per connection (established, FIN_WAIT, "
        "TIME_WAIT, some ends: the filter drops the others unseen) each costs 1.0 to 1.4 µs in recvmmsg, 0.5 to 0.6 "
        "to decode with warm caches (0.9 to 1.0 before batches with some ends among them were read by columns), and "
        "judging, telling and the turn itself the rest, 2 to 3 µs per connection. Connections that are over within "
        "one window are not told, but with a life of six milliseconds one of three was alive at the end of a window "
        "of 20, and was told: 25 µs of the backup for each. Those wait for the next window now, while nearly all are "
        "over by then. Tried without a gain: places of 320 bytes for events instead of 1088; the usual instead of "
        "the real-time policy (80 % instead of 79 in those five rounds); a window of 50 ms instead of 20 (77 %); to "
        "hold them for half a window, which tells none later than before, but costs twice the turns and gains little "
        "where connections live longer than that. Not done: to leave the group of new entries, which would save one "
        "event of eight, because flows that are picked up in the middle or written by an operator are told nowhere "
        "else; to drop FIN_WAIT in the kernel, because a connection that is closed on one side would keep the timer "
        "of an open one on the peer; to drop the DESTROY of a connection in TIME_WAIT, because events of two "
        "processors may overtake each other, and then a replica would stay. Tried once: to mask events in the kernel "
        "(CT --ctevents assured,destroy for the first packet of a connection). A listener that drops everything then "
        "leaves 94 %, but ctsyncd no more than before: it does not see any more that a connection is over before it "
        "is told, tells each of them, and the peer would keep them as established until they are gone here."
    ),
    "latency-idle-p50": (
        "The first event is read at once, and so is each while there are few; what was read is told before "
        "anything else in that turn, and the backup gives the kernel its work before it acknowledges. All the "
        "Python on the way takes 0.12 ms where it runs again and again; after a pause of some milliseconds, on "
        "cold caches and with two processors that have to be woken, it is six times as much. Of that, measured "
        "where the daemons run, reading and decoding the event took 0.16 ms, judging it 0.08, packing and sealing "
        "0.15, sending 0.09; on the other side receiving 0.05, opening the datagram 0.08, taking it apart and "
        "storing what it says 0.13, the kernel's work 0.15. A row of its own is encoded without columns and judged "
        "without a flow being made of it; OpenSSL's context is kept, where the library would make one for each "
        "datagram, which takes 0.1 ms off each side; a datagram is waited for and read with one system call each, "
        "where it were two. The real-time policy took a tenth off. Single events, rows and requests "
        "go one by one, past what many need, which took a quarter off the lines of Python that run for a flow and a "
        "tenth off the time. Then what does not have to be done before the datagram, or the request, leaves was put "
        "behind it (to note what was told, to count, to look what is due), digests take flows that come one by one "
        "in lots of 64, and a single row is sent as it is instead of in columns: another tenth. What is left is "
        "spread over two hundred small functions and six system calls, and is as long where both processors are "
        "kept awake, and even after 2 ms of an empty loop in the same process: it is the processor that forgot its "
        "branches, not a core that slept, and how much depends on what else the machine is used for. An event that "
        "comes after a pause is read by itself, without ctypes and its call of recvmmsg: that takes 0.016 ms less."
    ),
    "latency-load-p99": (
        "The window shrinks to 2 ms at this rate, counted from the reading before. It used to follow the time "
        "between two events with the third power, so that a moment's hesitation of the load made a window of 20 "
        "ms out of one of 2.5: now the rate is averaged over a quarter of a second. A nice value does not help "
        "against programs of other sessions (autogroup) or control groups; with the lowest real-time priority the "
        "p99 went from 8 ... 19 ms to about 3.3 ms, on a machine that others used, too."
    ),
    "active-2000": (
        "A connection is told in one of the four events that the kernel must deliver for it (established, "
        "closing, over, gone); the other three are read to know that it is not worth telling any more. Reading "
        "one costs 1.0 µs in the kernel (recvmmsg, 256 at a time) and 0.4 µs in Python where everything is in the "
        "caches; at 2000/s nothing is, and a turn costs about three times that. Fewer turns help most (windows of "
        "10, 20, 30 ms were tried), but what waits is lost with the node. Connections that are over within a "
        "window are no longer told, so that nothing is sealed, sent or acknowledged for them."
    ),
    "flood-transit": (
        "Of the cost of an event that is read from a full queue 1.0 to 1.1 µs are recvmmsg (64, 256 or 1024 at a "
        "time, in places of 320, 512 or 1088 bytes, on huge pages: the same; without copying a byte 0.75). It is not "
        "asked for the sender of each message, which takes 0.05 to 0.1 µs: the socket is connected to the kernel, "
        "which then refuses what other programs send to it. "
        "What comes on top when the queue is not full are turns: some 0.3 ms each, "
        "which is why the window has its full length in a flood (from 35,000 flows a second on). What is new now is "
        "counted over 50 ms besides a quarter of a second: until the average had risen past the rates at which the "
        "window is short, each flood began with some sixty turns of a hundred flows, half of all that a flood of "
        "100,000 had, and all of one of 20,000. And events that are many are read a window after the reading "
        "before, where the first of them used to wake the daemon for every window, and each acknowledgement "
        "again. Events that are all "
        "alike are not sorted: they are judged by the layout of those before, and read where recvmmsg put them. To"
        " join them first, so that their columns lie closer, took 0.12 µs for each and made the columns no "
        "cheaper: 0.28 instead of 0.40 µs to decode one. Attribute headers are compared word by word with those of "
        "the message before, in places: 0.13 µs for each of 512 events where byte columns take 0.16 and one long "
        "number 0.17; column by column from words of an array it was the same as bytes. "
        "A flood goes as columns from the reading to the datagram: no dictionary and no value of its own is made "
        "of a flow that is new and not translated, nothing is joined and cut up again, and what datagrams have in "
        "common is made once for a thousand flows. To be judged, noted, compared and packed, such a flow took 1.3 "
        "µs where it had taken 1.6 to 1.9 (in one process, in turn). Of that 0.2 are its part of the digest by "
        "which both nodes' tables are compared all the time: a CRC and a sum in Python, for which products of long"
        " numbers were given up (0.13 instead of 0.19 µs where everything is in the caches). The sum in C alone, "
        "without buckets, would take 0.05: not worth the buckets, by which a difference is found at once in the "
        "midst of a flood. The rest is 0.1 to compare headers, 0.1 to make keys, 0.15 for a place in the table, "
        "0.25 to pack, seal and remember a datagram's hundred flows, 0.1 to send them. In whole floods of 100,000 "
        "(five of each kind, by turns, on a machine that others used a little) the active node took 2.9 µs instead "
        "of 3.5, 3.2 instead of 4.4 and 3.6 instead of 4.2 (transit, site, snat), conntrackd 5.3, 5.4 and 7.0. An "
        "aim of a third is out of reach as long as receiving alone is a fifth. After that not one "
        "datagram of these floods turned out to go the short way of RowColumns: one column of ports is a few "
        "well-known ones and one of five at random, and timers tick. They do now, which took the packing of a "
        "datagram from 16 to 20 µs to 2.5 to 4 (five pairs by turns: transit 3.0 to 2.5 µs, the others 0.1 to 0.2 "
        "less). Written, measured and left out: datagrams of one length, which the kernel cuts itself (UDP_SEGMENT). "
        "With a hundred flows in each that is 0.05 µs of a flow, which five pairs of runs did not show; it pads 2 %, "
        "a full queue loses sixteen datagrams at once, and the counters of a veth pair would not see the headers of "
        "all datagrams but one. Not done: to look at half the bytes of headers, those that tell them apart, for "
        "0.03. No gain: 1536 events at a time; a CRC of all keys by "
        "columns. A page that is touched first costs 3 to 4 µs on this "
        "machine, 0.1 µs a flow, most of it where the table of what was told doubles."
    ),
    "flood-site": "See the flood of transit flows.",
    "flood-snat": "See the flood of transit flows.",
    "active-200-tuned": (
        "Forty to fifty windows a second, each a wake-up on cold caches; conntrackd's filter leaves one event of "
        "a connection, ours four, because the backup is told how a connection ends."
    ),
    "steady": (
        "Two milliseconds of window, for the latency at this rate, mean 500 turns a second of about 0.3 ms "
        "besides what grows with the events. From 25,000 a second on the window grows again. conntrackd has its "
        "events one by one and gathers nothing; injected in bursts of a millisecond they are cheap for it."
    ),
    "delete": (
        "The same number of events to read as flows; what is told of a flow is shorter, and its place in two "
        "tables is looked up. See the flood of transit flows."
    ),
    "idle-backup": (
        "One wake-up for each heartbeat, twice a second, of about 0.4 ms: the datagram is opened, the answer "
        "sealed and sent. See the active node."
    ),
    "backup-200-cache": (
        "See the backup in hot standby: what a wake-up costs, not what is done in it. Here it need not ask the "
        "kernel for anything, and its time is mostly that of receiving, opening, acknowledging."
    ),
    "active-200": (
        "Some forty windows in a second, each a wake-up on cold caches, of about 0.7 ms: reading and decoding 0.2, "
        "judging and packing 0.2, sealing 0.05, sending 0.08, the rest the loop. Keeping OpenSSL's context took "
        "0.1 ms off each datagram, and what nothing asks for is left out of a turn. A longer window makes it "
        "proportionally less, but what waits is lost with the node."
    ),
    "active-2000-snat": "See the row without SNAT.",
    "wire-transit": (
        "A random flow has some 10 bytes that nobody can foretell: 4 of the client's address, 4 of the server's, "
        "2 of its port; what is left is the datagram's and columns' overhead, 2 to 3 bytes where a datagram "
        "carries a hundred flows, and the acknowledgements. zlib over the columns took 10 to 18 % off where it "
        "was tried, for 0.3 to 0.7 µs a flow, which is more than the flood may cost."
    ),
    "wire-snat": (
        "As with transit flows; the translated port, where it differs from the client's (one in eight), has to "
        "be told for all flows of a datagram, in a column of its own."
    ),
    "latency-idle-p99": (
        "See the median. Single ones take longer where an event meets the second's work or a heartbeat, and where "
        "the machine is late: two processors for two firewalls, both daemons and the load, in a virtual machine. "
        "What can wait comes behind the telling of a change now."
    ),
}
