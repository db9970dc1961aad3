"""The kinds of fault: each is inflicted under load, and cured before its function returns."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random

import psutil
from database import CAN_MOUNT, Postgres
from load import Load
from network import Link, Trap
from service import Service

# A holder of the head's lock that has stopped lets go after 5 s at the most; the rest is what a flush and a busy
# machine of two cores may add.
OTHERS_STALL_S = 5 + 2.5
_OUTAGE_STALL_S = 30  # of one who waits for a service or a database that is down, with its restart
_FREEZE_S = (7.7, 8.7)  # longer than the others may have to wait
_DATABASE_FREEZE_S = 10


@dataclass
class Scene:
    """Where a fault happens."""

    postgres: Postgres
    services: Sequence[Service]
    load: Load
    random: Random

    def pause(self, shortest_s: float, longest_s: float) -> None:
        time.sleep(self.random.uniform(shortest_s, longest_s))

    def some_service(self) -> Service:
        return self.random.choice(self.services)


@dataclass(frozen=True)
class Kind:
    """A fault, how often it comes in twenty rounds, and for how long nobody may be acknowledged."""

    name: str
    inflict: Callable[[Scene], None]
    share: int
    longest_stall_s: float
    needs_root: bool = False


def kill_worker(scene: Scene) -> None:
    worker = _catch_worker(scene, signal.SIGKILL)
    psutil.wait_procs([worker], timeout=10)


def stop_worker(scene: Scene) -> None:
    worker = _catch_worker(scene, signal.SIGSTOP)
    scene.pause(*_FREEZE_S)
    with suppress(psutil.NoSuchProcess):  # its supervisor may have replaced it
        worker.resume()


def kill_service(scene: Scene) -> None:
    service = scene.some_service()
    if scene.random.random() < 0.3:
        service.kill_supervisor()
    else:
        service.kill()
    scene.pause(0, 0.5)
    service.start()


def terminate_service(scene: Scene) -> None:
    service = scene.some_service()
    if status := service.stop():
        scene.load.record.complain(f"a service that was told to stop ended with status {status}")
    service.start()


def kill_postgres(scene: Scene) -> None:
    for _ in range(scene.random.choice([1, 1, 2])):
        if scene.random.random() < 0.3:  # one process only: the postmaster ends all others and recovers
            kill = lambda link: scene.postgres.backend_of(link.server_port).kill()  # noqa: E731
            _spring(scene, scene.some_service(), Trap(kill, after_passing=scene.random.random() < 0.5))
        else:
            scene.postgres.crash()
            scene.postgres.ensure_running()
        scene.pause(0.2, 1.5)


def freeze_postgres(scene: Scene) -> None:
    scene.postgres.send(signal.SIGSTOP)
    time.sleep(_DATABASE_FREEZE_S)
    scene.postgres.send(signal.SIGCONT)


def cut_connection(scene: Scene) -> None:
    """Several times: in the request, when the server has it and before any answer, or in the answer."""
    for _ in range(scene.random.randrange(3, 8)):
        place = scene.random.choice(["request", "answer", "answer"])
        length = scene.random.choice([0, 1, 40, 200, 10_000])

        def cut(link: Link, place: str = place, length: int = length) -> None:
            setattr(link, f"{place}_bytes_left", length)

        _spring(scene, scene.some_service(), Trap(cut, scene.random.randrange(6)))


def stop_backend(scene: Scene) -> None:
    """Several times: the server's process has a flush before it and stands still, while its client is cut off,
    sends the flush again and is served by another process. Then the first goes on.
    """
    for _ in range(scene.random.randrange(2, 5)):
        stopped: list[psutil.Process] = []

        def stop(link: Link, stopped: list[psutil.Process] = stopped) -> None:
            stopped.append(scene.postgres.backend_of(link.server_port))
            stopped[0].suspend()
            link.cut_after_request()

        _spring(scene, scene.some_service(), Trap(stop, only_flushes=True))
        scene.pause(*scene.random.choice([(0.1, 0.6), (0.1, 0.6), (2.5, 4)]))
        for backend in stopped:
            backend.resume()
        scene.load.wait_for_acknowledgements(20)


def lose_host(scene: Scene) -> None:
    """Packets of one writer's connection vanish, or all of one host's where there is another."""
    service = scene.some_service()
    if len(scene.services) > 1 and scene.random.random() < 0.5:
        service.proxy.darken()
    else:
        trap = Trap(Link.darken, scene.random.randrange(6), after_passing=scene.random.random() < 0.5)
        _spring(scene, service, trap)
    scene.pause(*_FREEZE_S)
    service.proxy.relight()


def fill_disk(scene: Scene) -> None:
    scene.postgres.fill_disk()
    if scene.random.random() < 0.5:
        scene.postgres.switch_wal()
    scene.pause(1, 3)
    scene.postgres.free_disk()
    scene.postgres.ensure_running()


KINDS = (
    Kind("kill a worker", kill_worker, 2, OTHERS_STALL_S),
    Kind("stop a worker", stop_worker, 2, OTHERS_STALL_S),
    Kind("kill the service", kill_service, 2, _OUTAGE_STALL_S),
    Kind("end the service (SIGTERM)", terminate_service, 1, _OUTAGE_STALL_S),
    Kind("kill PostgreSQL", kill_postgres, 3, _OUTAGE_STALL_S),
    Kind("freeze PostgreSQL", freeze_postgres, 1, _OUTAGE_STALL_S),
    Kind("cut the connection", cut_connection, 3, OTHERS_STALL_S),
    Kind("stop a backend", stop_backend, 2, OTHERS_STALL_S),
    Kind("lose a host's packets", lose_host, 2, OTHERS_STALL_S),
    Kind("fill the disk", fill_disk, 2, _OUTAGE_STALL_S, needs_root=True),
)


def possible_kinds() -> list[Kind]:
    """Those that this user can inflict."""
    return [kind for kind in KINDS if CAN_MOUNT or not kind.needs_root]


def _catch_worker(scene: Scene, number: signal.Signals) -> psutil.Process:
    """Send the signal to a worker: at any moment, or when it has sent a request of a flush and waits."""
    service = scene.some_service()
    caught = [scene.random.choice(service.workers())]
    if scene.random.random() < 0.3:
        caught[0].send_signal(number)
        return caught[0]

    def catch(link: Link) -> None:
        if worker := service.worker_of(link):
            caught[0] = worker
            worker.send_signal(number)

    _spring(scene, service, Trap(catch, scene.random.randrange(6), after_passing=scene.random.random() < 0.5))
    return caught[0]


def _spring(scene: Scene, service: Service, trap: Trap) -> None:
    """Set the trap and wait until it has sprung; where nothing is flushed any more, take it away."""
    service.proxy.arm(trap)
    if not trap.sprung.wait(10):
        scene.load.record.complain("nothing was flushed for 10 s")
    service.proxy.arm(None)
