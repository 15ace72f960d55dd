"""Schedule tests with pytest-xdist, assign GPUs to workers, and report crashed workers.

Imports xdist, so import it only if xdist distributes the run. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import execnet
import pytest
from xdist.scheduler import LoadScheduling

from pytest_lmcompose.distribute.gpus import VISIBLE, share_of, visible_gpus
from pytest_lmcompose.distribute.lanes import PrefixScheduling, composition_in
from pytest_lmcompose.options import Options, asked_for_distribution

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import Scheduling
    from xdist.workermanage import WorkerController

    from pytest_lmcompose.session import Session


class Workers:
    """Implements the hooks of xdist on the controller."""

    def __init__(self, session: Callable[[], Session], options: Callable[[], Options]) -> None:
        """Take `session` and `options` as functions, because the first hook runs before they exist."""
        self._session, self._options = session, options

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_auto_num_workers(self) -> int | None:
        """Return the number of workers that the GPUs suffice for; None lets xdist decide."""
        if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
            return None
        each, gpus = self._gpus()
        return len(gpus) // each if gpus else None

    def pytest_xdist_setupnodes(self, specs: list[execnet.XSpec]) -> None:
        """Give each local worker its own GPUs; a replacement worker gets the same ones."""
        each, gpus = self._gpus()
        if not gpus or self._options().device.startswith("cuda:"):  # its number refers to all GPUs
            return
        for worker, spec in enumerate(specs):
            if spec.popen and VISIBLE not in spec.env:
                pinned = execnet.XSpec(f"{spec}//env:{VISIBLE}={','.join(share_of(gpus, worker, each))}")
                pinned.id = spec.id
                specs[worker] = pinned

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> Scheduling | None:
        """Schedule by prefixes, unless the user passed --dist or -d."""
        if asked_for_distribution(config):
            return None
        return cast("Scheduling", DeferredScheduling(config, log, self._session))

    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Record in the report that a worker crashed in the test of a composition."""
        if (composition := composition_in(crashitem)) is not None:
            self._session().crashed(composition, str(report.longrepr))

    def _gpus(self) -> tuple[int, tuple[str, ...]]:
        """Return the number of GPUs per worker, and all GPUs; none if workers are not pinned to GPUs."""
        options = self._options()
        each = options.gpus_per_worker
        if each == 0 or options.device in ("cpu", "mps"):
            return each, ()
        gpus = visible_gpus(os.environ)
        if options.device.startswith("cuda:"):
            return 1, gpus[:1]
        if 0 < len(gpus) < each:
            raise pytest.UsageError(
                f"--lmcompose-gpus-per-worker={each}: only {len(gpus)} GPUs are visible; use a smaller number"
            )
        return each, gpus


class DeferredScheduling:
    """Uses `PrefixScheduling` if any test has a composition, and xdist's default otherwise.

    Decides when the first worker has collected its tests, which is after xdist asks for a scheduler.
    """

    def __init__(self, config: pytest.Config, log: Producer | None, session: Callable[[], Session]) -> None:
        self._config, self._log, self._session = config, log, session
        self._chosen: Any = LoadScheduling(config, log)
        self._decided = False

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Record the tests that a worker collected; choose a scheduler for the first worker."""
        if not self._decided:
            self._decided = True
            if any(composition_in(nodeid) is not None for nodeid in collection):
                session, nodes = self._session(), self._chosen.nodes
                shared = session.options.cache_dir is not None
                self._chosen = PrefixScheduling(self._config, self._log, session.costs(), shared)
                for known in nodes:
                    self._chosen.add_node(known)
        self._chosen.add_node_collection(node, collection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chosen, name)
