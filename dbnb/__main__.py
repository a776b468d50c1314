"""`python -m dbnb`: the whole workflow without a notebook."""

from __future__ import annotations

import sys

from dbnb.config import parse_args


def main(argv: list[str] | None = None) -> int:
    """Run the workflow and print where the results are; an expected error is one sentence and exit code 2."""
    config = parse_args(argv)
    import torch  # after --help has had its chance

    from dbnb import metrics, workflow
    from dbnb.processes import processes

    workflow.quiet_libraries()
    try:
        result = workflow.run(config)
    except KeyboardInterrupt:
        print("dbnb: interrupted; class images and checkpoints that were complete are kept.", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        hint = "lower --train_batch_size or --sample_batch_size, or use --gradient_checkpointing"
        print(f"dbnb: Out of memory ({str(error).splitlines()[0]}): {hint}.", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"dbnb: {error}", file=sys.stderr)
        return 2
    first = processes().is_main_process
    processes().destroy_process_group()
    if not first:
        return 0
    if result.metrics is not None:
        print(metrics.metrics_table(result.metrics))
    print(f"Results are in {config.output_dir}: {', '.join(sorted(p.name for p in result.adapter.parent.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
