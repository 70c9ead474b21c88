"""Functions called on a Ray cluster: one that runs, or one of this machine's cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError

RETRIES = 5
"""How often what an ended worker had to do is done again."""


@dataclass(frozen=True)
class RayWorkers:
    """Workers of the cluster that `on_ray` has connected to.

    Attributes:
        count: how many calls are under way at once.
        cores: that each takes.
        gpus: that each takes, 0 or 1.
    """

    count: int
    cores: int
    gpus: int = 0

    def call(self, function: Callable[[Any, Any], Any], common: Any, each: Sequence[Any]) -> Sequence[Any]:
        """[function(common, one) for one in each]; see `matching.many.rounds.Workers`.

        Raises:
            ConfigError: the cluster is lost, or a call ended its worker each time.
        """
        ray = _ray()
        remote = ray.remote(_apply).options(num_cpus=self.cores, num_gpus=self.gpus, max_retries=RETRIES)
        shared = ray.put((function, common))
        try:
            return ray.get([remote.remote(shared, one) for one in each])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise ConfigError(f"Ray gave up ({reason[:200]}); see its logs, or leave --ray out.") from error


def _apply(shared: tuple[Callable[[Any, Any], Any], Any], one: Any) -> Any:
    function, common = shared
    return function(common, one)


def _ray() -> Any:
    return import_module("ray")  # late: an extra


def require_ray(option: str = "--ray") -> None:
    """Raise `ConfigError` unless Ray is installed."""
    if find_spec("ray") is None:
        raise ConfigError(f"{option} needs Ray, which is not installed: pip install 'git-rebasin[ray]'.")


def _connect(ray: Any, address: str) -> None:
    """Ray gives a cluster of its own 30 seconds to start, too little where others want the cores: then once more."""
    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    try:
        ray.init(None if address == "auto" else address, **quiet)
    except Exception:
        ray.shutdown()
        if address != "auto":
            raise
        ray.init(None, **quiet)


@contextmanager
def on_ray(
    address: str, most: int, threads: int = 0, device: str = "cpu", option: str = "--ray"
) -> Iterator[RayWorkers]:
    """Workers of a cluster, inside the block.

    Args:
        address: "auto": the cluster that runs on this machine, or is named in RAY_ADDRESS, else one of this machine's
            cores, which ends with the block; or a cluster's own address.
        most: workers that are of use.
        threads: cores of each; 0: what the cluster has for each of `most`.
        device: on "cuda" each has a GPU, on "auto" if the cluster has any.

    Raises:
        ConfigError: Ray is not installed, there is no cluster of this address, or it has no GPU.
    """
    require_ray(option)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    ray = _ray()
    own = not ray.is_initialized()
    try:
        if own:
            _connect(ray, address)
    except Exception as error:  # Ray raises what it likes, bare ones too
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(
            f"{option} is {address!r}, but no cluster answers there ({reason[:200]}); start one by `ray start --head`,"
            " or leave it out."
        ) from error
    try:
        has = ray.cluster_resources()
        cpus, gpus = int(has.get("CPU", 1)), int(has.get("GPU", 0))
        on_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
        if on_gpu and not gpus:
            raise ConfigError(f"--device is {device!r}, but Ray's cluster has no GPU; give --device cpu.")
        cores = min(cpus, threads or max(1, cpus // most))
        count = min(most, max(1, cpus // cores))
        yield RayWorkers(min(count, gpus) if on_gpu else count, cores, int(on_gpu))
    finally:
        if own:
            ray.shutdown()
