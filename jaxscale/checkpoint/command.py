"""`jaxscale checkpoint`: ls, verify, diff, convert."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxscale.checkpoint import tools
from jaxscale.checkpoint.layout import Layout, Op

HELP = """\
Look at checkpoints, check every byte, copy and rewrite them.

  jaxscale checkpoint ls PATH             the complete steps of a run
  jaxscale checkpoint verify PATH         read every byte and name what is damaged
  jaxscale checkpoint diff PATH PATH      which arrays differ, and by how much
  jaxscale checkpoint convert PATH DIR [PATTERN ...]   copy a step, or what matches: 'params/*'

A PATH is a step, or a run or another directory of steps (the newest is meant then). diff and convert take --layout
file.py:function, a function that returns a layout (jaxscale.checkpoint.layout), which is applied to the first PATH.
`convert PATH DIR --layout hf` writes the parameters of a step of `jaxscale train` as a Hugging Face directory, with
the tokenizer of its run."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; jaxscale checkpoint --help")


def checkpoint_command(args: Sequence[str], find_function: Callable[[str], Callable[..., Any]]) -> int:
    """Runs a subcommand; returns the exit status: 1 where something is damaged or differs.

    Args:
      find_function: "file.py:function" -> the function.
    """
    parser = Parser("jaxscale checkpoint", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="ls | verify | diff | convert", parser_class=Parser)
    verbs.add_parser("ls").add_argument("path")
    verbs.add_parser("verify").add_argument("path")
    diff, convert = verbs.add_parser("diff"), verbs.add_parser("convert")
    diff.add_argument("path")
    diff.add_argument("second")
    convert.add_argument("path")
    convert.add_argument("directory")
    convert.add_argument("patterns", nargs="*", metavar="pattern", help="of the names to keep, as 'params/*'")
    for verb in (diff, convert):
        verb.add_argument("--layout", help="file.py:function" + (", or hf" if verb is convert else ""))
    options = parser.parse_args(args)
    if options.verb is None:
        parser.print_help()
        return 0
    run = {"ls": _ls, "verify": _verify, "diff": _diff, "convert": _convert}[options.verb]
    return run(options, find_function)


def _ls(options: argparse.Namespace, find_function: Any) -> int:
    steps = tools.list_steps(options.path)
    for s in steps:
        print(f"step {s.step:>8}  {s.saved}  {s.num_bytes / 2**20:,.1f} MiB in {s.num_arrays} arrays")
    if not steps:
        raise ValueError(f"no complete step in {options.path}")
    return 0


def _verify(options: argparse.Namespace, find_function: Any) -> int:
    problems = tools.verify_step(options.path)
    print("\n".join(problems) or "every byte is as it was saved")
    return 1 if problems else 0


def _diff(options: argparse.Namespace, find_function: Any) -> int:
    differences = tools.diff_steps(options.path, options.second, layout=_layout(options.layout, find_function))
    for d in differences:
        figures = f"{d.changed:.1%} changed, largest {d.max_abs:.3g}, {d.relative:.2g} of norm" if d.changed else ""
        print(f"{d.name}  {d.kind}  {d.detail}{figures}")
    print(f"{len(differences)} array(s) differ" if differences else "the same")
    return 1 if differences else 0


def _convert(options: argparse.Namespace, find_function: Any) -> int:
    if options.layout == "hf":
        if options.patterns:
            raise ValueError("--layout hf writes all parameters and takes no patterns; jaxscale checkpoint --help")
        names = tools.export_step(options.path, options.directory)
    else:
        layout = _layout(options.layout, find_function)
        names = tools.convert_step(options.path, options.directory, layout=layout, only=options.patterns or None)
    print(f"wrote {len(names)} arrays to {options.directory}")
    return 0


def _layout(name: str | None, find_function: Callable[[str], Callable[..., Any]]) -> Layout:
    if name is None:
        return ()
    layout = find_function(name)()
    if not isinstance(layout, tuple | list) or not all(isinstance(op, Op) for op in layout):
        raise ValueError(
            f"{name} returned {type(layout).__name__}; a layout is a tuple of operations of jaxscale.checkpoint.layout"
        )
    return layout
