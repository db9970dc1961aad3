"""How much memory the processes of a service hold, sampled while it works."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_INTERVAL_S = 0.25


class MemoryWatch:
    """The highest resident size of any process under one, in MiB."""

    def __init__(self, pid: int) -> None:
        self._service = psutil.Process(pid)
        self._ended = threading.Event()
        self.peaks_mib: dict[int, float] = {}  # by process id

    def run(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            for process in self._service.children(recursive=True):
                self._sample(process)

    def stop(self) -> None:
        self._ended.set()

    def _sample(self, process: psutil.Process) -> None:
        try:
            resident_mib = process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            return
        self.peaks_mib[process.pid] = max(resident_mib, self.peaks_mib.get(process.pid, 0))


@contextmanager
def watching_memory(pid: int) -> Iterator[MemoryWatch]:
    watch = MemoryWatch(pid)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()
