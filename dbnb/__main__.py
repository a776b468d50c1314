"""`python -m dbnb`: the whole workflow without a notebook."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dbnb.config import parse_args


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `_Terminated`, so that what is half-written goes and locks are given back."""

    def end(*_) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # signals reach only the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> int:
    """Run the workflow and print where the results are; returns the exit code.

    0, or after one sentence 2 for an expected error, 130 for Ctrl-C and 143 for SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a console has no letter for is replaced, which ends no run
            stream.reconfigure(errors="replace")
    config = parse_args(argv)
    import torch  # after --help has had its chance

    from dbnb import metrics, workflow
    from dbnb.processes import processes

    workflow.quiet_libraries()
    try:
        with _terminable():
            result = workflow.run(config)
    except KeyboardInterrupt as error:
        print("dbnb: interrupted; class images and checkpoints that were complete are kept.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    except torch.OutOfMemoryError as error:
        hint = "lower --train_batch_size or --sample_batch_size, or use --gradient_checkpointing"
        print(f"dbnb: Out of memory ({str(error).splitlines()[0]}): {hint}.", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"dbnb: {error}", file=sys.stderr)
        return 2
    first = processes().is_main_process
    processes().destroy_process_group()
    code = 128 + signal.SIGINT if result.interrupted else 0
    if not first:
        return code
    if result.metrics is not None:
        print(metrics.metrics_table(result.metrics))
    print(f"Results are in {config.output_dir}: {', '.join(sorted(p.name for p in result.adapter.parent.iterdir()))}")
    return code


if __name__ == "__main__":
    sys.exit(main())
