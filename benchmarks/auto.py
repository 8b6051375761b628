"""What `--qsdp-bits auto` would choose on links of given rates, beside all that it predicts.

    sudo python benchmarks/auto.py --rate 100mbit 1gbit loopback --json auto.json

Hosts are network namespaces, as for link.py; `loopback` is plain processes without a shaper. On
each link the GPT of link.py's contestants is measured in fp32 and in bf16, as launch/train_gpt.py
would before its first step; the choice, the seconds a step predicted for every way and what was
measured are printed as JSON. Ways have the names of link.py's contestants, so that predictions can
be joined with its table.

Linux only; hosts need root and iproute2. Exits with status 2 without them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from contestants import MODELS
from namespaces import Hosts, Unavailable, exit_on_termination

from qsdp.files import write_json
from qsdp.train.config import PRECISIONS

LOOPBACK = "loopback"


def main() -> None:
    arguments = parse()
    if arguments.worker is not None:
        work(arguments)
        return
    exit_on_termination()
    try:
        record = {
            "machine": machine.describe(),
            "links": {rate: on_link(rate, arguments) for rate in arguments.rate},
        }
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if arguments.json is not None:
        write_json(arguments.json, record)
    print(json.dumps(record, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts, one rank each")
    parser.add_argument(
        "--rate", nargs="+", default=["100mbit"], help="what each host may send, or loopback"
    )
    parser.add_argument("--model", choices=MODELS, default="19m", help="its number of parameters")
    parser.add_argument("--tokens", type=int, default=768, help="a rank and step")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1, help="of torch, a rank")
    parser.add_argument("--repeats", type=int, default=1, help="measurings of each precision")
    parser.add_argument("--json", type=Path, help="a file for the record")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def on_link(rate: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the ranks found on one link."""
    environment = {"OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory(prefix="qsdp-auto-") as folder:
        out = Path(folder) / "found.json"
        command = [str(Path(__file__).resolve()), "--worker", str(out)]
        for name in ("model", "tokens", "context", "threads", "repeats"):
            command += [f"--{name}", str(getattr(arguments, name))]
        if rate == LOOPBACK:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(arguments.hosts), *command]
            done = subprocess.run(launcher, env=os.environ | environment, check=False)
            if done.returncode:
                raise RuntimeError(f"the ranks failed with status {done.returncode}")
        else:
            with Hosts(arguments.hosts, rate, offload=True) as hosts:
                hosts.run([sys.executable, *command], env=environment)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def work(arguments: argparse.Namespace) -> None:
    """Measure and decide on this rank, with all others."""
    import torch

    from qsdp.models import GPTConfig
    from qsdp.train.choose import choose
    from qsdp.train.config import TrainConfig
    from qsdp.train.world import end_process, open_world

    torch.set_num_threads(arguments.threads)
    layers, width = MODELS[arguments.model]
    size = GPTConfig(
        vocab_size=256,
        num_layers=layers,
        num_heads=width // 64,
        width=width,
        context=arguments.context,
    )
    found: dict[str, list[dict[str, Any]]] = {}
    with open_world(backend="gloo") as world:
        for precision in PRECISIONS:
            config = TrainConfig(
                qsdp_bits="auto",
                precision=precision,
                seq_len=arguments.context,
                batch_size=max(1, arguments.tokens // arguments.context),
                backend="gloo",
            )
            found[precision] = []
            for _ in range(arguments.repeats):
                choice = choose(config, size, world)
                found[precision].append(
                    {
                        "choice": contestant(choice.what, precision),
                        "line": choice.line,
                        "took_s": choice.took_s,
                        "predicted_s": {
                            contestant(way, precision): seconds
                            for way, seconds in choice.predicted_s.items()
                        },
                        "measured": choice.measured,
                    }
                )
        if world.is_main:
            write_json(arguments.worker, found)
    end_process(0)


def contestant(way: str, precision: str) -> str:
    """The name that link.py has for one of the cost model's ways."""
    bits, _, rest = way.partition(" bits gathered ")
    if not rest:  # stock FSDP2, which reduces in fp32 at either precision, as the trainer does
        return "fsdp-fp32" if precision == "fp32" else "fsdp-bf16-fp32-reduce"
    gather, *hops = rest.split(" in ")
    return f"qsdp-w{bits}g{bits}-{gather}-{precision}{'-two-hop' * bool(hops)}"


if __name__ == "__main__":
    main()
