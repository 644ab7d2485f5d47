"""``efftrain demo``: one story in three acts on real data, ending in a table and ``report.html``.

A model of smartwatch exercises is pretrained on a cluster, improved by the watches of eight people, and fine-tuned on
the watch of a ninth. Each act states what it promises and checks it; a broken promise ends the demo with an error.
"""

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from efftrain.cli.console import JsonOption, print_json, print_table, say
from efftrain.errors import ClaimError, ConfigError, ToolError
from efftrain.units import format_seconds

MARKER = "demo.txt"


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder of the demo; an earlier demo in it is replaced.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of all three acts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Pretrain on a cluster, improve over watches, fine-tune on a board: the whole framework in a minute or two."""
    _check_tools()
    _clear(out)
    say("loading torch and Flower ...")
    from efftrain.cli.demo_acts import cluster_act, device_act, federated_act
    from efftrain.cli.demo_page import demo_page, demo_table
    from efftrain.report.page import write_page
    from efftrain.report.run import RunFolder

    started = time.perf_counter()
    with RunFolder(out) as run:
        cluster = cluster_act(out, seed)
        federated = federated_act(out, seed, cluster.model_folder)
        device = device_act(out, seed, federated.model_folder)
        acts = (cluster, federated, device)
        claims = [claim for act in acts for claim in act.claims]
        result = run.finish(
            {
                "kind": "demo",
                "seed": seed,
                "wall_s": time.perf_counter() - started,
                "claims": [{"text": claim.text, "holds": claim.holds} for claim in claims],
                **{act.name: act.figures for act in acts},
            }
        )
    report = out / "report.html"
    write_page(demo_page(acts, result), report)
    if as_json:
        print_json({**result, "report": str(report)})
    else:
        print_table(demo_table(acts))
        say(f"{format_seconds(result['wall_s'])}; report written to {report}")
    broken = [claim.text for claim in claims if not claim.holds]
    if broken:
        raise ClaimError(f"{len(broken)} of {len(claims)} claims do not hold: {'; '.join(broken)}. See {report}")


def _check_tools() -> None:
    """Find out now what would be missing in the third act."""
    missing = [name for name in ("flwr", "unicorn", "elftools", "matplotlib") if not _is_installed(name)]
    if missing:
        raise ToolError(
            f"the demo needs {', '.join(missing)}, not installed here; "
            "run: pip install 'efftrain[federated,board,report]'"
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that something has blocked
        return False


def _clear(out: Path) -> None:
    """Make an empty folder, unless there is something in it that no demo wrote."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ConfigError(f"--out {out} holds files that no demo wrote; choose an empty or a new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Made by efftrain demo; the next demo replaces this folder.\n", encoding="utf-8")
