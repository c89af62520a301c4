"""Sends junk datagrams at a steady rate; the flood of the junk benchmark, in a process of its own.

    python -m scripts.benchmarks.junk_sender PORT RATE_PER_S SECONDS < DATAGRAMS_AS_JSON_LIST_OF_HEX

Prints how many it sent.
"""

import json
import socket
import sys
import time
from typing import Final

BATCHES_PER_S: Final = 250


def flood(port: int, rate: float, seconds: float, datagrams: list[bytes]) -> int:
    """Send for `seconds`, the datagrams one after the other, from the beginning again at the end."""
    sent, began = 0, time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.connect(("127.0.0.1", port))
        send, count = sending.send, len(datagrams)
        while (passed := time.monotonic() - began) < seconds:
            due = int(rate * passed) - sent
            for number in range(sent, sent + due):
                try:
                    send(datagrams[number % count])
                except OSError:
                    continue  # the receiver's port is closed for a moment, or the queue is full: loss like any other
            sent += due
            time.sleep(1 / BATCHES_PER_S)
    return sent


if __name__ == "__main__":
    listed = [bytes.fromhex(one) for one in json.load(sys.stdin)]
    print(flood(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), listed))
