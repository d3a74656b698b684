"""The commands, their help and their exits. Each imports what it needs when it runs: a refusal precedes torch."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.contract import ConfigError, write_atomically
from training.engine.errors import CRASH, EngineError, explain

EXITS = """
exit codes: 0 done; 2 the input cannot work; 42 out of memory; 43 the training diverged; 44 the disk is full;
75 interrupted, run again to continue; anything else is a crash. A failure is one sentence and the next step on stderr.
"""
logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
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
    if options.command == "train":
        from training.engine import session

        return session.main(options.run_dir)
    return _answer(options.run_dir, options.command, lambda: COMMANDS[options.command](options))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.engine",
        description="Preference tuning of language models in a run directory.",
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(
        commands, "train", "run or continue the training that RUN_DIR/config.json describes",
        """Writes events.jsonl, engine.log, checkpoints/, adapter/ and at the end result.json into RUN_DIR. Started
        again, it goes on from the newest checkpoint; a finished run is left as it is. Ctrl-C finishes the step and
        writes a checkpoint; a file named stop in RUN_DIR ends the run after its step and keeps the model.""",
    )  # fmt: skip
    _add_evaluate(commands)
    _add_merge(commands)
    _add_generate(commands)
    _add(
        commands, "estimate", "steps, tokens, memory and time of a run, without loading weights",
        """Reads RUN_DIR/config.json, tokenises the pairs and does the arithmetic. Prints JSON and keeps it in
        RUN_DIR/estimate.json. Counts of steps and tokens are exact, memory is good to 10 %, the time is rough.""",
    )  # fmt: skip
    convert = commands.add_parser("convert-gguf", help="turn a GGUF file into a safetensors folder, once")
    convert.add_argument("gguf", type=Path)
    convert.add_argument("out_dir", type=Path)
    commands.add_parser("chat", help="answer prompts with a base model and its adapters (JSON lines)")
    return parser


def _add(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.\n\n{textwrap.fill(' '.join(description.split()), 100)}",
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a directory with a config.json")
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="", metavar="step-000200", help="a checkpoint instead of the finished adapter"
    )


def _add_evaluate(commands: Any) -> None:
    parser = _add(
        commands, "evaluate", "metrics of a run's model on its validation pairs, or on others",
        """Prints JSON and keeps it in RUN_DIR/evaluate.json: loss, rewards, accuracy, log-probabilities and the
        exact KL under the keys that training uses. On the machine that trained they equal, to the last digit, what
        training said of the same weights. Watch prompts are not asked again: that is generate.""",
    )  # fmt: skip
    _add_checkpoint(parser)
    parser.add_argument(
        "--data",
        default="",
        metavar="FILE",
        help="canonical pairs, one JSON object a line, instead of the run's own",
    )


def _add_merge(commands: Any) -> None:
    parser = _add(
        commands, "merge", "write base + adapter as one model folder that needs no peft",
        """Computes in float32 and stores safetensors, tokenizer, chat template, generation config and a README in
        RUN_DIR/merged, complete or not at all. Of full fine-tuning: a checkpoint as such a folder.
        Prints JSON and keeps it in RUN_DIR/merge.json.""",
    )  # fmt: skip
    _add_checkpoint(parser)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the stored weights; auto: that of the base model's files",
    )  # fmt: skip
    parser.add_argument("--out", default="", metavar="DIR", help="another folder than RUN_DIR/merged")


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands, "generate", "answer prompts with a run's model, its base, or both",
        """Prints one JSON object a line for each answer, and keeps them in RUN_DIR/generate.json. Without
        --temperature the likeliest token is taken each time; with it, the same --seed gives the same answers, and
        both sides get the same draws.""",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a user's message; repeatable"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines: "text", [messages…] or {"prompt": …}, so pairs, too',
    )
    parser.add_argument(
        "--side", default="tuned", choices=("tuned", "base", "both"), help="which model answers"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    _add_checkpoint(parser)


def _evaluate(options: argparse.Namespace) -> Mapping[str, Any]:
    from training.engine import evaluate

    return _printed(evaluate(options.run_dir, checkpoint=options.checkpoint, data=options.data))


def _merge(options: argparse.Namespace) -> Mapping[str, Any]:
    from training.engine import merge

    return _printed(
        merge(options.run_dir, checkpoint=options.checkpoint, dtype=options.dtype, out_dir=options.out)
    )


def _estimate(options: argparse.Namespace) -> Mapping[str, Any]:
    from training.engine import estimate

    return _printed(estimate(options.run_dir))


def _generate(options: argparse.Namespace) -> Mapping[str, Any]:
    from training.engine.answering import SIDES, Settings, answers, read_prompts

    settings = Settings(
        sides=SIDES if options.side == "both" else (options.side,),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]
    found = []
    for answer in answers(options.run_dir.absolute(), prompts, settings, checkpoint=options.checkpoint):
        _say(json.dumps(answer, ensure_ascii=False))
        found.append(answer)
    return {"answers": found}


COMMANDS: dict[str, Callable[[argparse.Namespace], Mapping[str, Any]]] = {
    "evaluate": _evaluate,
    "merge": _merge,
    "generate": _generate,
    "estimate": _estimate,
}


def _answer(run_dir: Path, command: str, work: Callable[[], Mapping[str, Any]]) -> int:
    """Do it; what came out, or the sentence that says why not, is kept in RUN_DIR/<command>.json.

    result.json is training's own word and stays as it is.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    path, code = run_dir / f"{command}.json", 0
    try:
        outcome: dict[str, Any] = {"status": "succeeded", **work()}
    except Exception as error:
        explanation = explain(error, None).seen_from(run_dir.absolute())
        code = explanation.exit_code
        outcome = {"status": "failed", "error": explanation.sentence, "next_step": explanation.next_step}
        if not isinstance(error, (EngineError, ConfigError)):
            logger.error("%s failed", command, exc_info=error)
        sys.stderr.write(explanation.line)
    try:
        write_atomically(path, json.dumps(outcome, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        sys.stderr.write(f"{path} could not be written: {error.strerror}.\n")
        code = code or CRASH
    return int(code)


def _printed(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    _say(json.dumps(outcome, indent=2, ensure_ascii=False, allow_nan=False))
    return outcome


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
