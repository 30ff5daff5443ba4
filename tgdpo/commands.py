"""The commands: a table, and what runs a row of it."""

import difflib
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        name: What users type.
        module: What runs; ``python -m`` with it does the same.
        help: One line.
    """

    name: str
    module: str
    help: str


COMMANDS = (
    Command("preprocess", "tgdpo.preprocess", "tokenise preference pairs into a dataset for training"),
    Command("train", "tgdpo.train", "train with TGDPO, DPO or another method; one process a rank"),
    Command("doctor", "tgdpo.doctor", "say what would stop a run: machines, models, data, memory, network"),
    Command("dpo-guide", "tgdpo.dpo_guide", "train the guide of a TGDPO config, with DPO or another method"),
    Command("pipeline", "tgdpo.pipeline", "guide, guidance cache, training, export, evaluation: all from one config"),
    Command("convert", "tgdpo.convert", "convert checkpoints: to-megatron, to-hf"),
    Command("verify", "checkpoints_convert.verify", "check that an HF and a Megatron checkpoint are the same model"),
    Command("guidance", "tgdpo.guidance", "compute log-probs of reference and guide once, for guidance.mode=cached"),
    Command("report", "tgdpo.report", "show what a guide rewards, token by token, as one HTML page"),
    Command("evaluate", "tgdpo.evaluate", "compare models on held-out pairs and on answers of their own"),
    Command("generate", "tgdpo.generate", "answer AlpacaEval 2, Arena-Hard or MT-Bench"),
    Command("judge", "tgdpo.judge", "have a model or a server judge two files of answers, or score one"),
    Command("build-preferences", "tgdpo.build_preferences", "make preference pairs from a model's own answers"),
    Command("plan", "tgdpo.plan", "memory, traffic and step time of layouts, on paper"),
    Command("plot", "tgdpo.plot", "draw what runs logged: loss, accuracy, margin, token weights"),
    Command("sweep", "tgdpo.sweep", "train every combination of some alphas and betas"),
    Command("import-config", "tgdpo.import_config", "turn a config of the reference code into one of this project"),
)

CONVERSIONS = (
    Command("to-megatron", "checkpoints_convert.hf_to_megatron", "an HF directory to a Megatron checkpoint"),
    Command("to-hf", "checkpoints_convert.megatron_to_hf", "a Megatron checkpoint to an HF directory"),
)


def run_command(
    prog: str,
    about: str,
    commands: Sequence[Command],
    arguments: Sequence[str],
    version: str = "",
) -> int:
    """Runs the command that the first argument names, with the others, as ``python -m`` runs its module.

    Only that module is imported. It ends the process with its exit status, as a rule; else this returns.

    Args:
        prog: What the table's commands stand behind, for help and errors.
        about: One line on it.
        commands: The table.
        arguments: The command line, without the program.
        version: What ``--version`` prints; empty: there is no such option.

    Returns:
        0 after help or version; 2 where no command has the name.
    """
    name, *others = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_help(prog, about, commands, "[-h] [--version]" if version else "[-h]"))
        return 0
    if name == "--version" and version:
        print(version)
        return 0
    found = next((command for command in commands if command.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [command.name for command in commands], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"see {prog} --help"
        print(f"{prog}: there is no command {name!r}: {hint}", file=sys.stderr)
        return 2
    sys.argv[1:] = others
    runpy.run_module(found.module, run_name="__main__", alter_sys=True)
    return 0


def _help(prog: str, about: str, commands: Sequence[Command], options: str) -> str:
    width = max(len(command.name) for command in commands)
    rows = [f"  {command.name.ljust(width)}  {command.help}" for command in commands]
    return "\n".join(
        [f"usage: {prog} {options} COMMAND ...", "", about, "", *rows, "", f"{prog} COMMAND --help says more of each."]
    )
