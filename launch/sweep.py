"""Runs sweeps: ``python -m gradlab.launch.sweep --config=FILE --sweep=NAMES``.

The config file defines the sweeps, ``def sweep_learning_rate(): ...``, with the
functions of ``gradlab.sweeps``; ``--sweep=learning_rate,seed`` is their product. Arms
that differ only in seeds and float hyperparameters are one compiled program; the others
are jobs of their own. The folder, ``--workdir``, says what is done: the same command
goes on where it stopped, whatever was killed, and writes the report when all arms are
over.
"""

from absl import flags

from gradlab.launch._sweep import server


def run() -> None:
  """The console entry point."""
  # Workers are forked from a process that imports while this one does.
  server.start()
  from gradlab.launch._sweep import program

  flags.adopt_module_key_flags(program)
  program.run()


if __name__ == "__main__":
  run()
