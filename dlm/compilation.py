"""Compiling once: programs on disk that later processes read, and the seconds compiling takes.

Commands call `keep_programs` before they compile anything; a notebook does so in its first lines:

    import dlm
    dlm.keep_programs()

Nothing is kept unless it is called. The environment decides over it: DLM_PROGRAMS=off switches it
off, DLM_PROGRAMS=/some/folder keeps programs there, and where JAX_COMPILATION_CACHE_DIR is set
JAX's own settings are left as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
from jax import monitoring

SWITCH = "DLM_PROGRAMS"
MAX_BYTES = 2 * 2**30
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"
_PHASES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def keep_programs(
    folder: str | os.PathLike[str] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    environ: Mapping[str, str] = os.environ,
) -> pathlib.Path | None:
    """Keeps what this process compiles, for later ones; and reads what earlier ones kept.

    What was not used for longest is deleted as the folder grows beyond `max_bytes`. Each kind of
    machine has a folder of its own below it, as programs for CPUs use what the machine has.

    Args:
      folder: where; None: `dlm/programs` in the user's cache directory ($XDG_CACHE_HOME or
        ~/.cache).
      max_bytes: > 0, on disk, per kind of machine.
      environ: whose DLM_PROGRAMS ("off", or a folder) and JAX_COMPILATION_CACHE_DIR decide.

    Returns:
      Where programs are kept; None: they are not, as DLM_PROGRAMS says.

    Raises:
      ValueError: `max_bytes` is not positive.
      OSError: the folder cannot be made.
    """
    if max_bytes <= 0:
        raise ValueError(f"max_bytes={max_bytes} must be above 0, or {SWITCH}=off set")
    said = environ.get(SWITCH, "")
    if said == "off":
        return None
    if own := environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(own)
    if not said and folder is None:
        caches = environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(caches) / "dlm" / "programs"
    path = pathlib.Path(said or str(folder)).expanduser() / machine()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", max_bytes)
    # Many small programs take longer than a few large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def machine() -> str:
    """The kind of machine, as the name of a folder: architecture, and a hash of its features."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "feat"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@dataclasses.dataclass
class Compiling:
    """What is compiled inside of a `with` block, by any thread of this process.

    Attributes:
      num: programs asked for.
      hits: of these, how many were read from disk.
    """

    num: int = 0
    hits: int = 0
    _spans: list[tuple[float, float]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """Wall time of tracing, lowering, and compiling or reading from disk."""
        return sum(end - start for start, end in self._spans)

    def __enter__(self) -> Self:
        monitoring.register_event_listener(self._count)
        monitoring.register_event_duration_secs_listener(self._measure)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        monitoring.unregister_event_listener(self._count)
        monitoring.unregister_event_duration_listener(self._measure)

    def _count(self, event: str, **_: Any) -> None:
        self.num += event == _REQUEST
        self.hits += event == _HIT

    def _measure(self, event: str, duration_secs: float, **_: Any) -> None:
        if event not in _PHASES:
            return
        end = time.perf_counter()
        start = end - duration_secs
        while self._spans and self._spans[-1][1] > start:  # traced inside of this one
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))
