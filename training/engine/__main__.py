"""The engine's command line. Each subcommand imports what it needs, so that a refusal comes before torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run or continue the training described in RUN_DIR/config.json")
    train.add_argument("run_dir", type=Path)
    convert = commands.add_parser("convert-gguf", help="turn a GGUF file into a safetensors folder, once")
    convert.add_argument("gguf", type=Path)
    convert.add_argument("out_dir", type=Path)
    commands.add_parser("chat", help="answer prompts with a base model and its adapters (JSON lines)")
    options, rest = parser.parse_known_args(arguments)

    if options.command == "chat":
        from training.engine import chat

        return int(chat.main(rest) or 0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "convert-gguf":
        from training.engine import convert_gguf

        return convert_gguf.main(options.gguf, options.out_dir)
    if not options.run_dir.is_dir():
        parser.error(f"{options.run_dir} is not a directory")
    from training.engine import session

    return session.main(options.run_dir)


if __name__ == "__main__":
    sys.exit(main())
