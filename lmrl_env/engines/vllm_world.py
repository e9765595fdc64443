"""vLLM's process groups, kept apart from the trainer's."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed.distributed_c10d as c10d


class VllmWorld:
    """What torch.distributed knows of vLLM's process groups of one rank.

    Left alone, vLLM would take the trainer's default process group for its own and, when it ends,
    destroy it.
    """

    _TABLES = (
        "_pg_map",
        "_pg_names",
        "_pg_group_ranks",
        "_pg_backend_config",
        "_pg_to_tag",
        "_tags_to_pg",
    )
    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self._state: dict[str, Any] = {table: {} for table in self._TABLES}
        self._state["_group_count"] = 1000 * next(self._numbers)  # names that no other group has
        self._default: Any = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put vLLM's groups in the place of the trainer's, but show none of them as the default.

        Undoes as well what vLLM does to the whole process: it seeds every global generator, and
        on the CPU it disables ``torch.set_num_threads``.
        """
        set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
        random_state, numpy_state = random.getstate(), np.random.get_state()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        trainers_default = self._swap(None)
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
                yield
        finally:
            self._default = self._swap(trainers_default) or self._default
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            random.setstate(random_state)
            np.random.set_state(numpy_state)

    def destroy(self) -> None:
        """Destroy vLLM's groups; to be called while ``entered``."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        default = c10d.GroupMember.WORLD or self._default
        c10d._update_default_pg(None)  # else it would unregister the trainer's groups too
        cleanup_dist_env_and_memory()
        if default is not None:
            c10d.destroy_process_group(default)

    def _swap(self, default: Any) -> Any:
        """Exchange the tables with torch's, and the default group, which is returned."""
        for name, value in self._state.items():
            self._state[name] = getattr(c10d, name)
            setattr(c10d, name, value)
        previous = c10d.GroupMember.WORLD
        c10d._update_default_pg(default)
        return previous
