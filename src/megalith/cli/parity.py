"""`megalith parity`: does the layout of a configuration compute what one process computes?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import typer

from megalith.cli.options import JsonFile
from megalith.cli.pretrain import ConfigFile, ConfigName, ConfigPath, Overrides, root_of
from megalith.errors import EXIT_FAILURE, EXIT_SUCCESS, MegalithError

if TYPE_CHECKING:
    from megalith.config.compose import Gathered
    from megalith.tasks.pretrain_config import PretrainConfig
    from megalith.tools.miniature import Miniature
    from megalith.tools.parity import Report


def parity(
    overrides: Overrides = None,
    config_name: ConfigName = None,
    config_path: ConfigPath = None,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Compare a layout with one process, number by number: loss, gradients, norm, weights, tokens.

    Takes the configuration of `megalith pretrain` (a BERT's, T5's or BART's with --config-name megatron_bert_config, …);
    needs neither data nor a tokenizer nor a GPU. Sizes are shrunk and every choice is kept; what was changed is printed.
    Runs on the CPU in float64, with as many processes as the layout has (at most 8).

    Example: megalith parity model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2

    Exit code: 0 they agree, 1 they differ, 2 something to mend.
    """
    from megalith.config.compose import gather

    root = root_of(config_name, config_path, config)
    gathered = gather(
        root,
        config_name=config_name,
        config_path=config_path,
        config_file=config,
        overrides=overrides or (),
    )
    settled = settled_without_data(root, gathered)
    from megalith.tools.miniature import miniature

    small = miniature(settled)
    _show_changes(small)
    code, found = _run(small)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    raise typer.Exit(code)


def settled_without_data(root: type[PretrainConfig], gathered: Gathered) -> PretrainConfig:
    """The configuration, which need not name data. What it says about the layout without effect is told."""
    from megalith.cli.errors import show_notices
    from megalith.config.compose import settle
    from megalith.config.tree import get, put
    from megalith.data.config import PATH_KEYS

    data = get(gathered.merged.tree, ("model", "data"), {})
    if isinstance(data, dict) and not any(data.get(key) for key in ("data_prefix", *PATH_KEYS.values())):
        put(gathered.merged.tree, ("model", "data", "data_prefix"), "not read")
    composed = settle(root, gathered)
    about_layout = ("model.sequence_parallel", "model.zero_")
    show_notices([notice for notice in composed.notices if notice.startswith(about_layout)])
    return composed.config


def _run(small: Miniature) -> tuple[int, dict[str, object]]:
    """→ exit code, and what --json writes. The processes end whatever happens."""
    import torch

    from megalith.cli.errors import show_failure
    from megalith.testing.pool import RankFailure, RankPool
    from megalith.tools.parity import check, first_words

    torch.set_num_threads(1)  # matrices are tiny, and the other processes want the cores
    # Forked before this process has computed anything, ranks need not import torch again.
    method = "fork" if sys.platform == "linux" else "spawn"
    with closing(RankPool(small.sizes.world, method=method)) as pool:
        pool.start(small.sizes.world)
        try:
            with _progress() as say:
                report = check(small, pool, say)
        except RankFailure as failure:
            show_failure(f"{small.sizes.describe()} does not run: {first_words(failure)}")
            print(failure, file=sys.stderr)
            return EXIT_FAILURE, {"agrees": False, "layout": small.sizes.describe(), "failed": str(failure)}
    _show(report)
    return EXIT_SUCCESS if report.agrees else EXIT_FAILURE, report.as_json()


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What runs at the moment: a line that turns on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda text: console.print(f"running {text} …", soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda text: status.update(f"running {text} …")


def _show_changes(small: Miniature) -> None:
    from megalith.cli.output import print_table

    print(f"{small.asked.describe()} against one process, in small:", flush=True)
    print_table(("key", "yours", "here"), [(c.key, c.yours, c.here) for c in small.changes])
    print("Every other key has your value.\n", flush=True)


def _show(report: Report) -> None:
    from megalith.cli.errors import show_error
    from megalith.cli.output import print_table
    from megalith.testing.parity import TOLERANCE
    from megalith.tools.parity import KINDS

    rows = [
        (
            KINDS[row.kind],
            str(row.tensors),
            f"{row.worst:.1e}" if row.worst else "0",
            row.tensor if row.worst else "",
            _mark(row.agrees),
        )
        for row in report.rows
    ]
    print_table(("", "tensors", "worst", "of", ""), rows)
    print("worst: largest difference of a tensor, relative to its largest element; "
          f"up to {TOLERANCE:g} is rounding\n")  # fmt: skip
    world = report.miniature.sizes.world
    if report.first is None:
        print(f"The same: {world} processes compute what one computes ({report.seconds:.1f} s).", flush=True)
        return
    sys.stdout.flush()
    what = f"{report.differing} numbers and tensors differ, first {report.first.name} by {report.first.relative:.1e}"
    show_error(MegalithError(what, fix=f"probably {report.cause.text}" if report.cause else ""))


def _mark(agrees: bool) -> str:
    return "ok" if agrees else "differs"
