"""`python -m smc.compiler.training`: train the small model, or go on with a run that was cut."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from smc.compiler.packages import require_packages
from smc.compiler.programs import run as run_program

STARTED = time.monotonic()
"""Before torch is imported: a time limit counts from here."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smc.compiler.training", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the run; one that was cut goes on")
    parser.add_argument("--photographs", type=Path, help="folder of smc.compiler.scenes.photographs [default: textures of noise alone]")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of the run, start-up and earlier parts included")
    length.add_argument("--steps", type=int, help="length of the run")
    parser.add_argument("--model", default="pocket", help="a preset or a config.json [default: pocket]")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="weights to begin with, of the same model [default: random ones]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes, 0 to 4095 [default: 0]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the network without torch.compile")
    parser.add_argument("--save-minutes", type=float, default=2.0, help="how often to save [default: 2]")
    arguments = parser.parse_args()
    require_packages("training", ("torch", "safetensors"))

    from smc.compiler.config import resolve_config
    from smc.compiler.training.train import Options, Run

    options = vars(arguments)
    run = Run(Options(config=resolve_config(options.pop("model")), **options), STARTED)
    record = run.train(lambda line: print(line, flush=True))
    print(f"{arguments.out}: {record['steps']} steps, {record['pairs']:,} pairs, {record['minutes']} minutes")


if __name__ == "__main__":
    run_program(main)
