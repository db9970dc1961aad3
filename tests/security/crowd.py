"""A crowd of clients that only hold connections: `python crowd.py PORT SLOW IDLE`, until standard input ends.

Slow ones send a head byte by byte and never end it (slowloris); idle ones send nothing. Whom the service cuts off comes
back. Prints a line whenever it was asked: how many are connected.
"""

import asyncio
import itertools
import os
import random
import sys

START_S = 8.0  # over which they arrive, and so are cut off one after the other later
HEAD = b"GET /events HTTP/1.1\r\nHost: audit\r\nX-Filler: "
_connected = 0


async def hold(port: int, address: str, is_slow: bool) -> None:
    global _connected
    await asyncio.sleep(random.random() * START_S)  # noqa: S311 - a load, not a secret
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
        except OSError:
            await asyncio.sleep(1)
            continue
        _connected += 1
        try:
            ended = asyncio.ensure_future(reader.read())
            for byte in itertools.chain(HEAD, itertools.repeat(ord("a"))) if is_slow else ():
                writer.write(bytes([byte]))
                if (await asyncio.wait([ended], timeout=2))[0]:
                    break
            await ended
        except OSError:
            pass  # cut off
        finally:
            _connected -= 1
            writer.close()


async def main(port: int, slow: int, idle: int) -> None:
    # One address has 28,000 ports, and each stays in TIME_WAIT for a minute.
    addresses = itertools.cycle(f"127.0.1.{number}" for number in range(1, 21))
    holding = [asyncio.create_task(hold(port, next(addresses), number < slow)) for number in range(slow + idle)]
    while await asyncio.to_thread(sys.stdin.readline):
        print(_connected, flush=True)
    for task in holding:
        task.cancel()


if __name__ == "__main__":
    os.nice(10)  # it stands for machines of its own
    asyncio.run(main(*map(int, sys.argv[1:])))
