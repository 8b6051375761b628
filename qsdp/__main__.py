"""The command ``qsdp``, which is ``python -m qsdp`` too, and on many ranks ``torchrun -m qsdp``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

import qsdp
from qsdp.commands.exit import one_sentence_at_the_end, run
from qsdp.common.printing import is_rank_0
from qsdp.common.user_errors import UserError

COMMANDS = {
    "prepare": "encode text files into token shards, to train on",
    "train": "train a language model: quantized wires, methods that make it compress well",
    "evaluate": "loss and perplexity of a trained model, as it is and compressed",
    "compress": "compress a trained model in one shot",
    "export": "write a trained model as the transformers library has it",
    "selfcheck": "prove codec, collectives and hooks on this machine, or on all ranks",
}
"""What a command does, by its name; it is the ``main`` of that file in ``commands``."""

_ABOUT = f"""usage: qsdp COMMAND [flags]

Train GPT-family models over slow networks, and compress them in one shot.

{chr(10).join(f"  {name:<10} {told}" for name, told in COMMANDS.items())}

qsdp COMMAND --help explains its flags. On many ranks:

  torchrun --standalone --nproc-per-node 2 -m qsdp train --qsdp-bits 8 --cram"""


def main() -> NoReturn:
    """Run the command that ``sys.argv`` names, and end the process with its exit status."""
    run(_run_command)


def _run_command() -> None:
    name, *flags = sys.argv[1:] or [""]
    with one_sentence_at_the_end("nothing was begun"):
        if name in COMMANDS:
            sys.argv[:] = [f"qsdp {name}", *flags]  # as its --help has it
            import_module(f"qsdp.commands.{name}").main()
        elif flags or name not in ("-h", "--help", "--version"):
            given = f"{name[:99]!r} is no command" if name else "no command is given"
            raise UserError(f"{given}: choose {', '.join(COMMANDS)}, or see qsdp --help alone.")
        elif is_rank_0():
            print(f"qsdp {qsdp.__version__}" if name == "--version" else _ABOUT)


if __name__ == "__main__":
    main()
