"""The process that a sweep's workers are forked from."""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def start() -> ForkServerContext:
  """Starts the server, if it does not run yet, and returns what makes processes.

  It imports all that a job needs. It starts no backend, whose threads would not
  survive the fork.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["gradlab.launch._sweep.preload"])
  forkserver.ensure_running()
  return context
